"""AdamW with GPT-2's groups; Muon beside AdamW; the schedules of their rates. Needs torch alone.

    optimizer = adamw(model, 6e-4, 0.1, (0.9, 0.95))
    optimizer = muon_and_adamw(model, 4e-3, 0.05, (0.8, 0.95), muon_lr=0.025, embed_lr=0.3)

Muon, for the matrices inside the blocks, makes each update orthogonal: it moves all directions of a
matrix equally, those too that the gradient hardly shows. Embeddings, the head and what is not a
matrix stay with AdamW, each kind with a rate of its own.
"""

import math
from collections import defaultdict

import torch
import torch.distributed as dist

from runtime import like, whole

FUSED = ("cuda", "cpu", "mps", "xpu")  # devices with a one-kernel AdamW in torch 2.9 and later
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan 2024, kellerjordan.github.io/posts/muon


def adamw(model, learning_rate, weight_decay, betas):
    """Return AdamW over two groups: matrices and embeddings decay, biases and LayerNorms do not.

    Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization". Every parameter that
    requires a gradient is in exactly one group.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type in FUSED for p in parameters)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=fused)


def muon_and_adamw(model, learning_rate, weight_decay, betas, muon_lr, embed_lr,
                   dtype=torch.float32):
    """Return Muon over the blocks' matrices and AdamW over all else, as one optimizer.

    | owner: parameters                                | peak rate              | weight decay |
    |--------------------------------------------------|------------------------|--------------|
    | Muon: c_attn, c_fc, c_proj                       | muon_lr                | weight_decay |
    | embed: wte where it is not tied; value_embed     | embed_lr / s; half     | 0            |
    | head: lm_head, wte where it is tied, wpe         | learning_rate / s      | 0            |
    | vector: biases, norms, gate                      | 0.015                  | 0            |
    | resid_lambda, x0_lambda                          | 0.005, 0.1             | 0            |

    s = sqrt(n_embd / 768) carries the rates of embeddings and heads from one width to another;
    Muon's need no change, because an orthogonal update has the same spectral norm at any width
    (karpathy/nanochat, gpt.py, setup_optimizer; Bernstein 2025, "Deriving Muon"). The rates are
    those of modded-nanogpt's track 3 and nanochat. Raises ValueError for a parameter of no kind.
    dtype: of Newton-Schulz's products; bfloat16 where the hardware multiplies it, else float32.
    """
    config, owned = model.config, defaultdict(list)
    for name, p in model.named_parameters():
        if p.requires_grad:
            owned[owner(name, p, config.tied)].append((name, p))
    s = math.sqrt(config.n_embd / 768)
    peaks = {"embed": embed_lr / s, "value_embed": embed_lr / s / 2, "head": learning_rate / s,
             "vector": 0.015, "resid_lambda": 0.005, "x0_lambda": 0.1}
    groups = [{"params": [p for _, p in owned[kind]], "lr": peak}
              for kind, peak in peaks.items() if owned[kind]]
    fused = all(p.device.type in FUSED for group in groups for p in group["params"])
    # eps: a gradient of the mean loss is small, far below Adam's usual 1e-8 for most embeddings
    rest = torch.optim.AdamW(groups, betas=betas, eps=1e-10, weight_decay=0.0, fused=fused)
    hidden = [p for _, p in owned["hidden"]]
    parts = [row_parts(name, p, config) for name, p in owned["hidden"]]
    return Together(Muon(hidden, parts, muon_lr, weight_decay, dtype), rest)


def owner(name, p, tied):
    """Return the kind of a parameter: exactly one, or ValueError."""
    kind = name.removesuffix(".weight").rpartition(".")[2]
    if kind in ("value_embed", "resid_lambda", "x0_lambda"):
        return kind
    if kind in ("wte", "wpe", "lm_head"):
        return "embed" if kind == "wte" and not tied else "head"
    if p.dim() < 2 or kind == "gate":
        return "vector"
    if p.dim() == 2 and kind in ("c_attn", "c_fc", "c_proj"):
        return "hidden"
    raise ValueError(f"{name}, {tuple(p.shape)}: neither Muon nor AdamW is told to train it; "
                     "give it a kind in optim.owner, or use --optimizer=adamw")


def row_parts(name, p, config):
    """Return the rows of each matrix that stands in p: one under another in c_attn are those of
    queries, keys and values, in SwiGLU's c_fc the gate's and the other one's."""
    if name.endswith("c_attn.weight"):
        kv = config.kv_heads * config.head_dim
        return [config.n_embd, kv, kv]
    if name.endswith("c_fc.weight") and config.mlp == "swiglu":
        return [len(p) // 2] * 2
    return [len(p)]


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal (Jordan 2024). torch.optim.Muon is the same rule for one matrix at
    a time, always in bfloat16, which a CPU may only emulate; here matrices of a shape are one
    batch, queries, keys and values are matrices of their own, and decay is cautious: it acts where
    the update has the weight's sign (Chen et al. 2025, arXiv 2510.12402).

    Several processes share out the matrices of each shape, and give each other the results. Of
    parameters that FSDP2 shares out, each gathers the updates and keeps its part.

    found_inf: None, or 1.0 on the device where the update must change nothing, as AdamW has it.
    """

    found_inf = None

    def __init__(self, params, parts, lr, weight_decay, dtype=torch.float32):
        """parts: for each parameter the rows of the matrices in it."""
        params = list(params)
        for p in params:
            if p.dim() != 2:
                raise ValueError(f"Muon trains matrices, not a parameter of {tuple(p.shape)}")
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=0.95))
        self.parts = dict(zip(params, parts, strict=True))
        self.dtype = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            updates, batches = [], defaultdict(list)  # of each shape, the updates in matrices
            for p in params:
                if "momentum_buffer" not in self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                average, grad = self.state[p]["momentum_buffer"], p.grad
                if self.found_inf is not None:
                    grad = torch.where(self.found_inf > 0, average, grad)
                average.lerp_(grad, 1 - group["momentum"])
                updates.append(whole(grad.lerp(average, group["momentum"])))  # Nesterov's
                for matrix in updates[-1].split(self.parts[p]):
                    batches[matrix.shape].append(matrix)
            for (rows, columns), matrices in batches.items():
                made = shared_out(orthogonal, torch.stack(matrices).to(self.dtype))
                made = made.to(matrices[0].dtype) * max(1, rows / columns) ** 0.5
                torch._foreach_copy_(matrices, list(made.unbind()))
            for p, update in zip(params, updates, strict=True):
                update = like(p, update)
                if group["weight_decay"]:
                    update += group["weight_decay"] * p * (update * p > 0)
                if self.found_inf is not None:
                    update *= 1 - self.found_inf
                p.add_(update, alpha=-group["lr"])


def shared_out(function, x):
    """Return function(x) of x (N, ...), a batch that all processes have: each computes its part."""
    world = dist.get_world_size() if dist.is_initialized() else 1
    if world == 1 or len(x) == 1:
        return function(x)
    size = -(-len(x) // world)
    mine = x[size * dist.get_rank():][:size]
    part = x.new_zeros(size, *x.shape[1:])
    if len(mine):
        part[:len(mine)] = function(mine)
    made = x.new_empty(size * world, *x.shape[1:])
    dist.all_gather_into_tensor(made, part)
    return made[:len(x)]


def orthogonal(x, steps=5):
    """Return about U V^T for each matrix U S V^T of x (N, rows, columns): singular values go to
    0.7 to 1.2, but for those that are almost 0. Zeros stay zeros.

    Newton-Schulz with the coefficients that grow small values fastest (Jordan 2024).
    """
    if x.shape[-2] > x.shape[-1]:
        return orthogonal(x.mT, steps).mT
    a, b, c = NEWTON_SCHULZ
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # (N, rows, columns)
    for _ in range(steps):
        gram = x @ x.mT  # (N, rows, rows)
        gram = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, gram, x, beta=a)
    return x


class Together:
    """Two optimizers that are stepped, saved and loaded as one."""

    found_inf = None

    def __init__(self, *optimizers):
        self.optimizers = optimizers

    @property
    def param_groups(self):
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def state(self):
        return {p: state for optimizer in self.optimizers for p, state in optimizer.state.items()}

    def step(self):
        for optimizer in self.optimizers:
            optimizer.found_inf = self.found_inf
            optimizer.step()

    def zero_grad(self, set_to_none=True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self):
        return {type(optimizer).__name__: optimizer.state_dict() for optimizer in self.optimizers}

    def load_state_dict(self, state):
        for optimizer in self.optimizers:
            optimizer.load_state_dict(state[type(optimizer).__name__])


def set_rates(optimizer, peaks, share, iter_num):
    """Give each group its share of its own peak rate, and Muon its momentum: 0.85, and over the
    first 300 iterations up to 0.95 (KellerJordan/modded-nanogpt, record 9)."""
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["lr"] = peak * share
        if "momentum" in group:
            group["momentum"] = 0.85 + 0.1 * min(iter_num / 300, 1)


def lr_at(iter_num, learning_rate, min_lr, warmup_iters, lr_decay_iters, schedule="cosine",
          decay_share=0.5, used=None):
    """Return the learning rate of one iteration: linear warm-up, then down to min_lr.

    The first iteration is already above 0, the peak is reached at warmup_iters, min_lr at
    lr_decay_iters (Radford et al. 2018; nanoGPT's get_lr). cosine falls all the way; wsd stays at
    the peak, and falls linearly over the last decay_share of lr_decay_iters (Hu et al. 2024,
    MiniCPM; Haegele et al. 2024). used: of a budget that is not counted in iterations, the share
    that is used up, which takes the place of iter_num / lr_decay_iters after the warm-up.
    """
    if schedule not in ("cosine", "wsd"):
        raise ValueError(f"schedule={schedule!r}: choose cosine or wsd")
    if iter_num < warmup_iters:
        return learning_rate * (iter_num + 1) / (warmup_iters + 1)
    if iter_num >= lr_decay_iters if used is None else used >= 1:
        return min_lr
    if schedule == "wsd":
        left = (lr_decay_iters - iter_num) / lr_decay_iters if used is None else 1 - used
        return min_lr + min(1.0, left / decay_share) * (learning_rate - min_lr)
    progress = used
    if used is None:
        progress = (iter_num - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (learning_rate - min_lr)
