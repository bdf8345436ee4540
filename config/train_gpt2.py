# GPT-2 124M on FineWeb, as llm.c reproduced it (scripts/run_gpt2_124M.sh): 10B tokens.
#   python prepare.py --dataset=fineweb --ready_made=True    (10B tokens, 20 GB)
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
# Published: 8 x A100 80GB, 94 minutes, validation loss 3.29; 8 x H100, 45 minutes, 3.27 (llm.c's
# README and KellerJordan/modded-nanogpt, records/2024-10-13_llmc). Not yet measured with this code.

dataset = "fineweb"
out_dir = "out/gpt2"
wandb_project = "gpt2"

total_batch_size = 524288
batch_size = 64  # fits 80 GB; a smaller one only means more micro-steps
block_size = 1024

n_layer = 12
n_head = 12
n_embd = 768
bias = True

learning_rate = 6e-4
min_lr = 0.0
warmup_iters = 700
max_iters = 18865
lr_decay_iters = 18865
weight_decay = 0.1
beta1 = 0.9
beta2 = 0.95
grad_clip = 1.0

eval_interval = 250
eval_iters = 160  # * 64 * 1024 = 10,485,760 validation tokens
log_interval = 10
