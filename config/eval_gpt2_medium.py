# The loss of OpenAI's GPT-2 350M on OpenWebText's validation split.
#   python train.py config/eval_gpt2_medium.py                 (needs data/openwebtext)
# Published: validation loss 2.84 (nanoGPT's README, on its split). Minutes on a GPU.

init_from = "gpt2-medium"
dataset = "openwebtext"
eval_only = True
eval_iters = 500
batch_size = 8
