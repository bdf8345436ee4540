# Finetune a model by LoRA: 8 numbers beside each row and column of attention's first matrices are
# trained, everything else is frozen (Hu et al. 2021, arXiv 2106.09685).
#   python prepare.py --dataset=shakespeare
#   python train.py config/lora.py --init_from=gpt2 --dataset=shakespeare --out_dir=out/lora
#   python sample.py --out_dir=out/lora
# The checkpoint has the change merged in; its folder adapter/ has the change alone, for PEFT.
# Not measured with GPT-2's weights yet; with a small model: experiments/posttraining.md.

lora_rank = 8
lora_targets = "c_attn"

eval_interval = 50
eval_tokens = 40960
log_interval = 10
always_save_checkpoint = False

# 32 sequences per iteration
batch_size = 4
gradient_accumulation_steps = 8
block_size = 256
max_iters = 200
lr_decay_iters = 200

# about ten times the rate of finetuning all weights (Biderman et al. 2024, arXiv 2405.09673)
learning_rate = 3e-4
min_lr = 3e-5
warmup_iters = 10
