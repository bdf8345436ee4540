# A small GPT-2 on Shakespeare, character by character: nanoGPT's first example, with its settings.
#   python prepare.py --dataset=shakespeare_char
#   python train.py config/train_shakespeare_char.py
# Published: best validation loss 1.47 after 3 minutes on an A100 (nanoGPT's README). The README's
# smaller model for a CPU, measured here (experiments/pipeline.md): 1.876; nanoGPT's own: 1.88.
#   python train.py config/train_shakespeare_char.py --n_layer=4 --n_head=4 --n_embd=128 \
#     --block_size=64 --batch_size=12 --eval_iters=20 --max_iters=2000 --lr_decay_iters=2000 \
#     --dropout=0.0

out_dir = "out/shakespeare_char"
dataset = "shakespeare_char"
wandb_project = "shakespeare-char"

eval_interval = 250  # often, because this model overfits
eval_iters = 200  # nanoGPT's setting, because the command above changes it
log_interval = 10
always_save_checkpoint = False  # for the same reason: save the best only

batch_size = 64
gradient_accumulation_steps = 1
block_size = 256

n_layer = 6
n_head = 6
n_embd = 384
mlp = "gelu_exact"  # nanoGPT's GELU, which CPUs compute faster than GPT-2's approximation of it
dropout = 0.2

learning_rate = 1e-3
max_iters = 5000
lr_decay_iters = 5000
min_lr = 1e-4
beta2 = 0.99  # above the usual 0.95, because an iteration has few tokens
warmup_iters = 100
