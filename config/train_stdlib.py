# A small GPT-2 on the source of Python's standard library, byte by byte: what `make train` runs.
#   python prepare.py
#   python train.py config/train_stdlib.py

dataset = "stdlib"

eval_interval = 200
eval_iters = 40
log_interval = 10

batch_size = 16
gradient_accumulation_steps = 1
block_size = 128

n_layer = 4
n_head = 4
n_embd = 128

learning_rate = 4e-3
min_lr = 4e-4
warmup_iters = 100
max_iters = 1200
lr_decay_iters = 1200
