# The modern recipe on Shakespeare's characters; sizes as config/train_shakespeare_char.py.
#   python prepare.py --dataset=shakespeare_char
#   python train.py config/train_shakespeare_char_modern.py
# nanoGPT's small CPU model, with this recipe (a first trial with other code: 1.87 after 300
# iterations, 1.76 after 500, where nanoGPT has 1.88 after 2,000):
#   python train.py config/train_shakespeare_char_modern.py --n_layer=4 --n_head=4 --n_embd=128 \
#     --block_size=64 --batch_size=12 --dropout=0 --max_iters=300 --lr_decay_iters=300
# Neither is measured yet with this code.

out_dir = "out/shakespeare_char_modern"
dataset = "shakespeare_char"
wandb_project = "shakespeare-char"

eval_interval = 100  # often, because it overfits
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
rope = True
rmsnorm = True
qk_norm = True
mlp = "relu2"
tied = False
zero_init = True
softcap = 15.0
value_embeds = True
residual_scalars = True

optimizer = "muon"
learning_rate = 4e-3
muon_lr = 0.025
embed_lr = 0.3
weight_decay = 0.05
beta1 = 0.8
beta2 = 0.95
grad_clip = 0.0

schedule = "wsd"
decay_share = 0.5
min_lr = 0.0
warmup_iters = 0
max_iters = 600
lr_decay_iters = 600
