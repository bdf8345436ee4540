# A character-level model of Shakespeare: nanoGPT's hello world, with its settings.
#   python prepare.py --dataset=shakespeare_char
#   python train.py config/train_shakespeare_char.py

out_dir = "out/shakespeare_char"
dataset = "shakespeare_char"
wandb_project = "shakespeare-char"

eval_interval = 250  # often, because it overfits
eval_iters = 200
log_interval = 10
always_save_checkpoint = False  # for the same reason: keep the best

batch_size = 64
gradient_accumulation_steps = 1
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2

learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99  # larger, because an iteration has few tokens
warmup_iters = 100
