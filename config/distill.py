# Distillation: a small model learns the probabilities of a larger one with the same tokenizer,
# beside the text itself (Hinton et al. 2015, arXiv 1503.02531).
#   make train                                   # the teacher, or one of your own
#   python train.py config/train_stdlib.py config/modern.py config/distill.py \
#       --reference=out/stdlib_modern
#   python sample.py --out_dir=out/distilled --start="class "
# It says nothing about the data and the schedule, and goes on top of a config that does.
# After 400 iterations a validation loss of 1.42, of the small model alone 1.50
# (experiments/posttraining.md).

objective = "distill"
temperature = 2.0
distill_weight = 0.9
out_dir = "out/distilled"

# 0.2M parameters.
n_layer = 2
n_head = 4
n_embd = 64
