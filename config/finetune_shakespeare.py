# Finetune GPT-2 XL on Shakespeare: nanoGPT's settings; --init_from=gpt2 for a smaller one.
#   python prepare.py --dataset=shakespeare
#   python train.py config/finetune_shakespeare.py
# Some minutes on one GPU of 40 GB and more. No loss was published; not yet measured with this code.

init_from = "gpt2-xl"
dataset = "shakespeare"
out_dir = "out/shakespeare"
wandb_project = "shakespeare"

eval_interval = 5
eval_iters = 40
always_save_checkpoint = False

# 32 sequences of 1,024 tokens; Shakespeare has 301,966, so an epoch is about 9 iterations
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

learning_rate = 3e-5
decay_lr = False
