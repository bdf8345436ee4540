# The loss of OpenAI's GPT-2 1558M on OpenWebText's validation split.
#   python train.py config/eval_gpt2_xl.py                 (needs data/openwebtext)
# Published: validation loss 2.54 (nanoGPT's README, on its split). Minutes on a GPU.

init_from = "gpt2-xl"
dataset = "openwebtext"
eval_only = True
eval_iters = 500
batch_size = 8
