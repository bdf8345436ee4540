# Supervised fine-tuning: a base model learns to answer in conversations. The loss counts the
# assistant's words alone, and attention stays within a conversation.
#   make train                                   # the base model, or one of your own
#   python prepare.py --format=chat              # data/stdlib_chat
#   python train.py config/sft.py --init_from=out/stdlib_modern
#   python sample.py --interactive=True --out_dir=out/sft
# A validation loss of 0.91; of new small tasks 99% are answered exactly
# (experiments/posttraining.md).

dataset = "stdlib_chat"
out_dir = "out/sft"

eval_interval = 100
eval_tokens = 16384
log_interval = 10
always_save_checkpoint = False

mask_documents = True
# The rows' length, with which they were prepared.
block_size = 128
batch_size = 16
gradient_accumulation_steps = 1
# About five epochs.
max_iters = 640
lr_decay_iters = 640

learning_rate = 1e-3
min_lr = 1e-4
warmup_iters = 20
