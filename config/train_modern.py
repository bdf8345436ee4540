# The modern recipe at GPT-2 124M's size on FineWeb.
#   python prepare.py --dataset=fineweb --ready_made=True    (10B tokens, 20 GB; this reads 1.7B)
#   torchrun --standalone --nproc_per_node=8 train.py config/train_modern.py
# Published for this optimizer and nearly this model: 3,250 iterations to validation loss 3.28
# (KellerJordan/modded-nanogpt, track 3). Loss and minutes not yet measured with this code.

dataset = "fineweb"
out_dir = "out/modern"
wandb_project = "modern"

total_batch_size = 524288
batch_size = 64  # fits 80 GB; a smaller one only means more micro-steps
block_size = 1024

n_layer = 12
n_head = 6  # heads of 128: nanochat found them better than 64
n_embd = 768
rope = True
rmsnorm = True
qk_norm = True
mlp = "relu2"
tied = False
zero_init = True
softcap = 15.0
residual_scalars = True
value_embeds = False  # six tables of 50,304 rows would be 232M parameters more

optimizer = "muon"
learning_rate = 4e-3
muon_lr = 0.025
embed_lr = 0.3
weight_decay = 0.05
beta1 = 0.8
beta2 = 0.95
grad_clip = 0.0

schedule = "wsd"
decay_share = 0.7
min_lr = 0.0
warmup_iters = 0
max_iters = 3250
lr_decay_iters = 3250

eval_interval = 250
eval_iters = 160  # * 64 * 1024 = 10,485,760 validation tokens
log_interval = 10
