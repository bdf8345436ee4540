# The modern recipe on Shakespeare's characters; the sizes of config/train_shakespeare_char.py.
#   python prepare.py --dataset=shakespeare_char
#   python train.py config/train_shakespeare_char_modern.py
# 2 CPU cores without bfloat16 units: 26 minutes, loss 1.468 (371 iterations, by max_minutes), where
# nanoGPT needs 6 hours to 1.47, worked out from its time per iteration.
# nanoGPT's small CPU model, in 21 s to 1.87, where nanoGPT has 1.89 after 115 s:
#   python train.py config/train_shakespeare_char_modern.py --n_layer=4 --n_head=4 --n_embd=128 \
#     --block_size=64 --muon_lr=0.07 --max_iters=160 --lr_decay_iters=160 --eval_interval=160
# Both: experiments/characters.py, experiments/recipe.md.

out_dir = "out/shakespeare_char_modern"
dataset = "shakespeare_char"
wandb_project = "shakespeare-char"

eval_interval = 100
eval_iters = 27  # of batch_size: the whole validation split
log_interval = 10

batch_size = 16
gradient_accumulation_steps = 1
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.0  # 1.5 epochs: too few to overfit
rope = True
rmsnorm = True
qk_norm = True
mlp = "swiglu"
tied = False
zero_init = True
softcap = 15.0
value_embeds = True
residual_scalars = True

optimizer = "muon"
learning_rate = 4e-3
muon_lr = 0.04
embed_lr = 0.3
weight_decay = 0.05
beta1 = 0.8
beta2 = 0.95
grad_clip = 0.0

schedule = "wsd"
decay_share = 0.5
min_lr = 0.0
warmup_iters = 0
max_iters = 370
lr_decay_iters = 370
