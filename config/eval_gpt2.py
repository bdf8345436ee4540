# The loss of OpenAI's GPT-2 124M on OpenWebText's validation split.
#   python train.py config/eval_gpt2.py                 (needs data/openwebtext)
# Published: validation loss 3.12 (nanoGPT's README, on its split). Minutes on a GPU.

init_from = "gpt2"
dataset = "openwebtext"
eval_only = True
eval_iters = 500
batch_size = 8
