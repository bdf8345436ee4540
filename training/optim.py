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

from configurator import UserError
from runtime.processes import full_tensor, shard_like

FUSED = ("cuda", "cpu", "mps", "xpu")  # devices with a one-kernel AdamW in torch 2.9 and later
ADAMW_KEEPS = ("exp_avg", "exp_avg_sq", "step")  # as torch's names them in a checkpoint
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan 2024, kellerjordan.github.io/posts/muon


def adamw(model, learning_rate, weight_decay, betas):
    """Return AdamW over two groups: matrices and embeddings decay, biases and LayerNorms do not.

    Every parameter that requires a gradient is in exactly one group.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    common = dict(update=adamw_update, keeps=ADAMW_KEEPS, lr=learning_rate, betas=betas, eps=1e-8)
    return Optimizer([
        dict(common, params=[p for p in parameters if p.dim() >= 2], weight_decay=weight_decay),
        dict(common, params=[p for p in parameters if p.dim() < 2], weight_decay=0.0)])


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
    those of modded-nanogpt's track 3 and nanochat. Raises UserError for a parameter of no kind.
    dtype: of Newton-Schulz's products; bfloat16 where the hardware multiplies it, else float32.
    """
    config, owned = model.config, defaultdict(list)
    for name, p in model.named_parameters():
        if p.requires_grad:
            owned[owner(name, p, config.tied)].append((name, p))
    s = math.sqrt(config.n_embd / 768)
    peaks = {"embed": embed_lr / s, "value_embed": embed_lr / s / 2, "head": learning_rate / s,
             "vector": 0.015, "resid_lambda": 0.005, "x0_lambda": 0.1}
    # eps: a gradient of the mean loss is small, far below Adam's usual 1e-8 for most embeddings
    rest = [dict(params=[p for _, p in owned[kind]], update=adamw_update, keeps=ADAMW_KEEPS,
                 lr=peak, betas=betas, eps=1e-10, weight_decay=0.0)
            for kind, peak in peaks.items() if owned[kind]]
    hidden = [p for _, p in owned["hidden"]]
    parts = [row_parts(name, p, config) for name, p in owned["hidden"]]
    return Optimizer([muon_group(hidden, parts, muon_lr, weight_decay, dtype), *rest])


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
    raise UserError(f"{name}, {tuple(p.shape)}: neither Muon nor AdamW is told to train it; "
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


class Optimizer:
    """Groups of parameters, each with its own rate, its rule `update`, its settings, and the names
    of what the rule `keeps` of each parameter from step to step.

    To its users it is one of torch's; a subclass of theirs would import torch's compiler, which
    is half of the time that it takes to start (experiments/speed.md).

    found_inf: None, or 1.0 on the device where the step must change nothing.
    """

    found_inf = None

    def __init__(self, groups):
        self.param_groups, self.state = groups, {}

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if p not in self.state:
                    self.state[p] = {name: torch.zeros((), device=p.device) if name == "step"
                                     else torch.zeros_like(p) for name in group["keeps"]}
            if params:
                kept = [[self.state[p][name] for p in params] for name in group["keeps"]]
                group["update"](group, params, *kept, self.found_inf)

    def zero_grad(self):
        for p, _ in self.owned():
            p.grad = None

    def owned(self):
        """Return [(parameter, its group)], in the order in which state_dict counts them."""
        return [(p, group) for group in self.param_groups for p in group["params"]]

    def state_dict(self):
        """Return {"state": {number of the parameter: {name: tensor}}}. The groups' settings are the
        run's, and saved with it."""
        return {"state": {i: self.state[p] for i, (p, _) in enumerate(self.owned())
                          if p in self.state}}

    def load_state_dict(self, state):
        """Raises UserError where the state is not that of these parameters."""
        owned = self.owned()
        if len(state["state"]) not in (0, len(owned)):
            raise UserError(f"it is of {len(state['state'])} parameters, here are {len(owned)}")
        for i, values in state["state"].items():
            p, group = owned[i]
            if set(values) != set(group["keeps"]) or any(
                    value.shape != (() if name == "step" else p.shape)
                    for name, value in values.items()):
                raise UserError(f"{', '.join(values)} of parameter {i} do not fit the optimizer")
            self.state[p] = {name: (shard_like(p, value) if value.shape else value).to(p.device)
                             for name, value in values.items()}


def adamw_update(group, params, averages, squares, steps, found_inf):
    """Loshchilov and Hutter 2019, "Decoupled Weight Decay Regularization", Algorithm 2."""
    lr, (beta1, beta2), eps = group["lr"], group["betas"], group["eps"]
    grads, decay = [p.grad for p in params], group["weight_decay"]
    if params[0].device.type in FUSED:
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(params, grads, averages, squares, [], steps, lr=lr, beta1=beta1,
                            beta2=beta2, weight_decay=decay, eps=eps, amsgrad=False,
                            maximize=False, found_inf=found_inf)
        if found_inf is not None:
            torch._foreach_sub_(steps, [found_inf] * len(steps))
    elif found_inf is None or not found_inf.item():
        for p, g, m, v, step in zip(params, grads, averages, squares, steps, strict=True):
            step += 1
            m.lerp_(g, 1 - beta1)
            v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
            root = (v / (1 - beta2 ** step)).sqrt_().add_(eps)
            p.mul_(1 - lr * decay).addcdiv_(m / (1 - beta1 ** step), root, value=-lr)


def muon_group(params, parts, lr, weight_decay, dtype=torch.float32):
    """parts: for each parameter the rows of the matrices in it."""
    for p in params:
        if p.dim() != 2:
            raise UserError(f"Muon trains matrices, not a parameter of {tuple(p.shape)}")
    return dict(params=params, update=muon_update, keeps=("momentum_buffer",), lr=lr,
                weight_decay=weight_decay, momentum=0.95,
                parts=dict(zip(params, parts, strict=True)),
                dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)


def muon_update(group, params, averages, found_inf):
    """Momentum, made orthogonal (Jordan 2024). torch.optim.Muon is the same rule for one matrix at
    a time, always in bfloat16, which a CPU may only emulate; here matrices of a shape are one
    batch, queries, keys and values are matrices of their own, and decay is cautious: it acts where
    the update has the weight's sign (Chen et al. 2025, arXiv 2510.12402).

    Several processes share out the matrices of each shape, and give each other the results. Of
    parameters that FSDP2 shares out, each gathers the updates and keeps its part.
    """
    updates, batches = [], defaultdict(list)  # of each shape, the updates in matrices
    for p, average in zip(params, averages, strict=True):
        grad = p.grad
        if found_inf is not None:
            grad = torch.where(found_inf > 0, average, grad)
        average.lerp_(grad, 1 - group["momentum"])
        updates.append(full_tensor(grad.lerp(average, group["momentum"])))  # Nesterov's
        for matrix in updates[-1].split(group["parts"][p]):
            batches[matrix.shape].append(matrix)
    for (rows, columns), matrices in batches.items():
        made = shared_out(orthogonal, torch.stack(matrices).to(group["dtype"]))
        made = made.to(matrices[0].dtype) * max(1, rows / columns) ** 0.5
        torch._foreach_copy_(matrices, list(made.unbind()))
    for p, update in zip(params, updates, strict=True):
        update = shard_like(p, update)
        if group["weight_decay"]:
            update += group["weight_decay"] * p * (update * p > 0)
        if found_inf is not None:
            update *= 1 - found_inf
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
    gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)  # torch 2.13's name
    gather(made, part)
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
        raise UserError(f"schedule={schedule!r}: choose cosine or wsd")
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
