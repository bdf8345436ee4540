"""GPT-2, and ten switches to what came later: the maths of the model, its first weights, and its
weights on disk. Needs torch alone.

    model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128))
    losses = model(tokens, targets)   # (B, T) loss of each token; 0 where the target is IGNORE
    logits = model.logits(tokens)     # (B, T, V)
    cache = model.make_cache(B)       # keys and values, to give it one token more at a time:
    x = model.hidden(tokens, cache, start)[:, -1]  # tokens are at positions start, start + 1, ...

Sizes, everywhere: B batch, T time, C channels (n_embd), H heads, K heads of keys and values, D head
dim, M channels inside the MLP, V vocabulary, S positions that keys and values are kept of.
Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; the details are those
of OpenAI's code, github.com/openai/gpt-2, src/model.py.
"""

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import nn
from torch.nn import functional as F

IGNORE = -1  # a target that has no loss


@dataclass
class GPTConfig:
    """Sizes and switches of a model; the defaults are GPT-2 124M."""
    block_size: int = 1024  # longest sequence, tokens
    vocab_size: int = 50304  # rows of the embedding: GPT-2's 50257, padded to a multiple of 128
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True  # biases in Linear and LayerNorm, as in GPT-2
    # ten switches, each of which works alone; what they are worth: experiments/recipe.md
    rope: bool = False  # rotary positions instead of learned ones (Su et al. 2021)
    rmsnorm: bool = False  # RMSNorm without weights (Zhang, Sennrich 2019), of the embedding too
    qk_norm: bool = False  # RMSNorm of queries and keys (Henry et al. 2020)
    mlp: str = "gelu"  # relu2 (So et al. 2021, Primer) or swiglu (Shazeer 2020) instead
    tied: bool = True  # the token embedding is the head's matrix (Press, Wolf 2017)
    zero_init: bool = False  # each block begins as the identity: see GPT.init_weights
    softcap: float = 0.0  # logits stay within +-softcap (Gemma Team 2024, Gemma 2); 0: anywhere
    n_kv_head: int = 0  # heads of keys and values, shared by groups (Ainslie et al. 2023); 0: all
    value_embeds: bool = False  # a token table added to every other layer's values (@KoszarskyB)
    residual_scalars: bool = False  # a block reads a x + b x0, x0 the embedding (@Grad62304977)

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            least = int(field.name != "n_kv_head")
            if field.type is int and not (isinstance(value, int) and value >= least):
                raise ValueError(f"{field.name}={value}: must be {least} or more, a whole number")
        if self.n_embd % self.n_head:
            near = min((h for h in range(1, self.n_embd + 1) if self.n_embd % h == 0),
                       key=lambda h: abs(h - self.n_head))
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}; "
                             f"the nearest n_head that divides it is {near}")
        if self.n_layer > 10_000:  # a typing error, or a stranger's: it would take hours to refuse
            raise ValueError(f"n_layer={self.n_layer}: must be at most 10000")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: must be at least 0 and below 1")
        if not 0 <= self.softcap < math.inf:
            raise ValueError(f"softcap={self.softcap}: must be 0 or more, and finite")
        if self.mlp not in ACTIVATIONS:
            raise ValueError(f"mlp={self.mlp!r}: choose {', '.join(ACTIVATIONS)}")
        if self.n_head % self.kv_heads:
            raise ValueError(f"n_kv_head={self.n_kv_head} does not divide n_head={self.n_head}")
        if self.rope and self.head_dim % 2:
            raise ValueError(f"rope=True turns pairs of channels: n_embd / n_head = "
                             f"{self.head_dim} must be even")

    @property
    def head_dim(self):
        return self.n_embd // self.n_head

    @property
    def kv_heads(self):
        return self.n_kv_head or self.n_head


def swiglu(x):
    gate, x = x.chunk(2, -1)  # each (B, T, M)
    return F.silu(gate) * x  # (B, T, M)


ACTIVATIONS = {"gelu": lambda x: F.gelu(x, approximate="tanh"),  # as GPT-2 has it
               "relu2": lambda x: F.relu(x).square(), "swiglu": swiglu}


def make_norm(config):
    if config.rmsnorm:
        return nn.RMSNorm(config.n_embd, eps=1e-6, elementwise_affine=False)
    return nn.LayerNorm(config.n_embd, bias=config.bias)


def rotation(positions, head_dim):
    """Return (cos, sin), each (T, D/2): the angles by which each pair of channels turns."""
    channels = torch.arange(0, head_dim, 2, device=positions.device)  # (D/2,)
    angles = positions[:, None] * 10000.0 ** -(channels / head_dim)  # (T, D/2)
    return angles.cos(), angles.sin()  # each (T, D/2)


def rotate(x, cos, sin):
    """Turn channel i of x (..., T, D) with channel i + D/2 (GPT-NeoX's pairs)."""
    a, b = x.chunk(2, -1)  # each (..., T, D/2)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)  # (..., T, D)


class CausalSelfAttention(nn.Module):
    """Each position attends to itself and to the positions before it."""

    def __init__(self, config, has_table=False):
        super().__init__()
        H, K, D = config.n_head, config.kv_heads, config.head_dim
        self.c_attn = nn.Linear(config.n_embd, (H + 2 * K) * D, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.value_embed = nn.Embedding(config.vocab_size, K * D) if has_table else None
        self.gate = nn.Linear(min(12, config.n_embd), K, bias=False) if has_table else None
        self.sizes, self.dropout, self.qk_norm = (H, K, D), config.dropout, config.qk_norm
        # normalised queries and keys want a sharper softmax than 1/sqrt(D) (nanochat: 1.2 * 1.2)
        self.scale = 1.44 / math.sqrt(D) if config.qk_norm else None

    def forward(self, x, tokens=None, turn=None, cache=None, positions=None, mask=None):
        B, T, C = x.shape
        H, K, D = self.sizes
        heads = self.c_attn(x).view(B, T, H + 2 * K, D).transpose(1, 2)  # (B, H + 2*K, T, D)
        qk, v = heads.split((H + K, K), 1)  # (B, H + K, T, D), (B, K, T, D)
        if self.qk_norm:
            qk = F.rms_norm(qk, (D,), eps=1e-6).to(v.dtype)  # (B, H + K, T, D)
        if turn is not None:
            qk = rotate(qk, *turn).to(v.dtype)  # (B, H + K, T, D)
        if self.value_embed is not None:
            gate = 2 * torch.sigmoid(self.gate(x[..., :12])).transpose(1, 2)  # (B, K, T)
            table = self.value_embed(tokens).view(B, T, K, D).transpose(1, 2)  # (B, K, T, D)
            v = v + (gate[..., None] * table).to(v.dtype)  # (B, K, T, D)
        q, k = qk.split((H, K), 1)  # (B, H, T, D), (B, K, T, D)
        if cache is not None:  # (2, B, K, S, D): write the new positions, read them all
            cache[0].index_copy_(2, positions, k)
            cache[1].index_copy_(2, positions, v)
            k, v = cache  # each (B, K, S, D)
        p = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(
            q, k, v, mask, dropout_p=p, is_causal=mask is None and T > 1, scale=self.scale,
            enable_gqa=K != H)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, C)  # (B, T, C)
        y = self.c_proj(y)  # (B, T, C)
        return F.dropout(y, self.dropout, self.training)  # (B, T, C)


class MLP(nn.Module):
    """Four times wider inside; SwiGLU, which has two matrices there, 8/3 times."""

    def __init__(self, config):
        super().__init__()
        C, is_glu = config.n_embd, config.mlp == "swiglu"
        inner = -(-C // 3) * 8 if is_glu else 4 * C
        self.c_fc = nn.Linear(C, inner * (1 + is_glu), bias=config.bias)
        self.c_proj = nn.Linear(inner, C, bias=config.bias)
        self.activation, self.dropout = ACTIVATIONS[config.mlp], config.dropout

    def forward(self, x):
        x = self.activation(self.c_fc(x))  # (B, T, M)
        x = self.c_proj(x)  # (B, T, C)
        return F.dropout(x, self.dropout, self.training)  # (B, T, C)


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream after a norm of its input."""

    def __init__(self, config, has_table=False):
        super().__init__()
        self.ln_1 = make_norm(config)
        self.attn = CausalSelfAttention(config, has_table)
        self.ln_2 = make_norm(config)
        self.mlp = MLP(config)
        self.has_scalars = config.residual_scalars
        if self.has_scalars:
            self.resid_lambda = nn.Parameter(torch.empty(1))
            self.x0_lambda = nn.Parameter(torch.empty(1))

    def forward(self, x, x0, *context):
        """context: that of CausalSelfAttention.forward."""
        if self.has_scalars:
            x = self.resid_lambda * x + self.x0_lambda * x0  # (B, T, C)
        x = x + self.attn(self.ln_1(x), *context)  # (B, T, C)
        return x + self.mlp(self.ln_2(x))  # (B, T, C)


class HeadLoss(torch.autograd.Function):
    """The cross-entropy of the head for N tokens, some rows of logits at a time, never (N, V).

    The gradients are worked out with the losses, while their logits are there. That serves where
    the losses are summed: all have the same gradient then, which autograd hands over as one number
    expanded. Where they have not, it is done again (torch's linear_cross_entropy, from 2.13 on,
    does that always, and has no softcap).
    """

    @staticmethod
    def forward(ctx, x, weight, targets, cap, rows, learns):
        """Hidden states (N, C), weight (V, C), targets (N,) to losses (N,); learns: is there to be
        a backward pass?"""
        ctx.rest, ctx.dtypes = (cap, rows), (x.dtype, weight.dtype)
        kind = x.device.type
        half = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
        x = x.to(half)  # (N, C)
        weight = weight.to(half)  # (V, C)
        with torch.autocast(kind, enabled=False):
            losses, *slopes = head_losses(x, weight, targets, cap, rows, learns or None)  # (N,)
        ctx.save_for_backward(x, weight, targets, *slopes)
        return losses  # (N,)

    @staticmethod
    def backward(ctx, scale):
        x, weight, targets, *slopes = ctx.saved_tensors
        if scale.stride() == (0,):
            slopes = [slope * scale[0] for slope in slopes]
        else:
            _, *slopes = head_losses(x, weight, targets, *ctx.rest, scale)
        return *(s.to(dtype) for s, dtype in zip(slopes, ctx.dtypes, strict=True)), *[None] * 4


def head_losses(x, weight, targets, cap, rows, scale):
    """Return the losses (N,), and the gradients of x (N, C) and of weight (V, C) when scale (N,) is
    that of the losses; True: 1 for each; None: no gradients. The products are in the dtype of x and
    weight, all else in float32."""
    losses, dx = x.new_empty(len(x), dtype=torch.float32), []
    dw = None if scale is None else torch.zeros_like(weight, dtype=torch.float32)  # (V, C)
    for first in range(0, len(x), rows):
        part = slice(first, first + rows)
        place, counts = targets[part, None].clamp(min=0), targets[part, None] != IGNORE  # (n, 1)
        logits = F.linear(x[part], weight).float()  # (n, V)
        if cap:
            logits = cap * torch.tanh(logits / cap)  # (n, V)
        slope = F.log_softmax(logits, -1)  # (n, V)
        losses[part] = (-slope.gather(-1, place) * counts)[:, 0]
        if scale is None:
            continue
        slope = slope.exp_()  # (n, V): the softmax, and 1 less for the target
        slope.scatter_add_(-1, place, -torch.ones_like(place, dtype=slope.dtype))
        if cap:
            slope *= 1 - (logits / cap).square_()
        if scale is not True:
            slope *= scale[part, None]
        slope = slope.to(x.dtype)  # (n, V)
        dx.append(slope @ weight * counts)  # (n, C)
        dw += slope.T @ (x[part] * counts)  # (V, C)
    return (losses,) if scale is None else (losses, torch.cat(dx), dw)


class GPT(nn.Module):
    """The transformer. Its parameters bear nanoGPT's names; a tied head is the token embedding."""
    chunk = 2**25  # logits that exist at a time, in float32, while a loss of more is computed
    document_start = None  # a token: attention does not look back beyond it, save from a cache

    def __init__(self, config, generator=None):
        """generator: a CPU torch.Generator for the first weights; None takes torch's own."""
        super().__init__()
        self.config, layers = config, config.n_layer
        learned = {} if config.rope else {"wpe": nn.Embedding(config.block_size, config.n_embd)}
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.vocab_size, config.n_embd), **learned,
            h=nn.ModuleList(Block(config, config.value_embeds and (layers - i) % 2 == 1)
                            for i in range(layers)),  # the last one has a table
            ln_f=make_norm(config),
        ))
        if not config.tied:
            self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.init_weights(generator)

    @torch.no_grad()
    def init_weights(self, generator=None):
        """Draw the first weights, N(0, s) with s =     GPT-2's                  zero_init
            c_proj, into the residual stream            0.02 / sqrt(2 n_layer)   0
            lm_head, where it is not tied               0.02                     0
            wte, where it is not tied                   0.02                     1
            wte, where it is tied; wpe                  0.02                     0.02
            c_attn, c_fc, value_embed                   0.02                     1 / sqrt(3 C)
        Biases, gate and x0_lambda begin at 0, LayerNorm's weights and resid_lambda at 1.
        GPT-2's: Radford et al. 2019, section 2.3. The others: KellerJordan/modded-nanogpt, track 3;
        at GPT-2's width 1 / sqrt(3 C) is 0.02 again."""
        c = self.config
        scales = {"c_proj": 0.02 / math.sqrt(2 * c.n_layer)}
        if c.zero_init:
            scales = {"c_proj": 0.0, "lm_head": 0.0, "wte": 0.02 if c.tied else 1.0,
                      **dict.fromkeys(("c_attn", "c_fc", "value_embed"), (3 * c.n_embd) ** -0.5)}
        for name, p in self.named_parameters():
            kind = name.removesuffix(".weight").rpartition(".")[2]
            if kind in ("bias", "gate", "x0_lambda"):
                p.zero_()
            elif p.dim() == 2:
                p.normal_(0.0, scales.get(kind, 0.02), generator=generator)
            else:  # LayerNorm, resid_lambda
                p.fill_(1.0)

    def make_cache(self, batch_size, dtype=None):
        """Room for the keys and values of `batch_size` sequences of block_size tokens,
        (n_layer, 2, B, K, block_size, D), for `hidden`; of the weights' device. dtype: that of the
        matrix products (under autocast not the weights')."""
        c = self.config
        return self.transformer.wte.weight.new_zeros(
            c.n_layer, 2, batch_size, c.kv_heads, c.block_size, c.head_dim, dtype=dtype)

    def hidden(self, tokens, cache=None, start=0):
        """Token ids (B, T) to the last hidden states (B, T, C). Raises ValueError for a position
        beyond block_size: there are none there.

        cache: from make_cache; tokens are then those at positions start to start + T - 1, which
        are written into it and attend to what it holds before them. start: an int; or an int64
        tensor () below block_size, unchecked, for the same shapes, and one CUDA graph, at every
        position: the whole cache is then read, under a mask.
        """
        B, T = tokens.shape
        size = self.config.block_size
        fixed = isinstance(start, torch.Tensor)
        end = size if fixed else start + T
        if end > size:
            raise ValueError(f"a sequence of {end} tokens is longer than the model's "
                             f"block_size={size}; give it at most that many")
        positions = torch.arange(T, device=tokens.device) + start  # (T,)
        mask = None  # which means causal, or all that there is for a single token
        if cache is not None and (fixed or start > 0 and T > 1):
            mask = torch.arange(end, device=tokens.device) <= positions[:, None]  # (T, S)
        elif cache is None and self.document_start is not None:
            documents = (tokens == self.document_start).cumsum(1)  # (B, T)
            same = documents[:, :, None] == documents[:, None]  # (B, T, T)
            mask = same.tril()[:, None]  # (B, 1, T, T)
        x = self.transformer.wte(tokens)  # (B, T, C)
        turn = None
        if self.config.rope:
            turn = rotation(positions, self.config.head_dim)  # each (T, D/2)
        else:
            x = x + self.transformer.wpe(positions)  # (B, T, C)
        if self.config.rmsnorm:
            x = self.transformer.ln_f(x)  # (B, T, C): it has no weights, so one serves both ends
        x = x0 = F.dropout(x, self.config.dropout, self.training)  # each (B, T, C)
        for i, block in enumerate(self.transformer.h):
            layer = None if cache is None else cache[i, ..., :end, :]  # (2, B, K, S, D)
            x = block(x, x0, tokens, turn, layer, positions, mask)  # (B, T, C)
        return self.transformer.ln_f(x)  # (B, T, C)

    def head(self, x):
        """Hidden states (..., C) to logits (..., V)."""
        cap, last = self.config.softcap, self.transformer.wte if self.config.tied else self.lm_head
        logits = F.linear(x, last.weight)  # (..., V)
        if cap:
            logits = cap * torch.tanh(logits / cap)  # (..., V)
        return logits  # (..., V)

    def logits(self, tokens):
        """Token ids (B, T) to the logits of the next token, (B, T, V)."""
        return self.head(self.hidden(tokens))  # (B, T, V)

    def forward(self, tokens, targets):
        """Return the cross-entropy in nats of each target, (B, T), float32; 0 where IGNORE.

        tokens, targets: (B, T) int64. The caller divides the sum by the number of targets, which
        it alone knows when a batch is accumulated or shared out over devices.
        """
        x = self.hidden(tokens).flatten(0, 1)  # (B*T, C)
        c, last = self.config, self.transformer.wte if self.config.tied else self.lm_head
        # compiled, the float32 logits are not kept either, and the products are done once
        if len(x) * c.vocab_size > self.chunk and not torch.compiler.is_compiling():
            losses = HeadLoss.apply(x, last.weight, targets.flatten(), c.softcap, max(
                1, self.chunk // c.vocab_size), torch.is_grad_enabled())  # (B*T,)
        else:
            losses = F.cross_entropy(self.head(x).float(), targets.flatten(),
                                     ignore_index=IGNORE, reduction="none")  # (B*T,)
        return losses.view_as(targets)  # (B, T)

    def crop_block_size(self, block_size):
        """Forget the positions from `block_size` on, to train or sample with shorter sequences."""
        if not 1 <= block_size <= self.config.block_size:
            raise ValueError(f"block_size={block_size}: this model has positions 1 to "
                             f"{self.config.block_size}")
        self.config = replace(self.config, block_size=block_size)  # others may share the old one
        if not self.config.rope:
            weight = self.transformer.wpe.weight[:block_size].detach().clone()
            self.transformer.wpe = nn.Embedding.from_pretrained(weight, freeze=False)

    def parameter_count(self):
        """The number of parameters, without the position embedding (nanoGPT's way of counting)."""
        return sum(p.numel() for name, p in self.named_parameters() if "wpe" not in name)

    def flops_per_token(self):
        """FLOPs of a forward and a backward pass for one token of a sequence of block_size:
        6 N + 12 n_layer C T (Chowdhery et al. 2022, PaLM, appendix B); a table that is only
        looked up, as value embeddings and an untied token embedding are, is not in N."""
        c = self.config
        tables = ("value_embed.weight",) if c.tied else ("value_embed.weight", "wte.weight")
        N = self.parameter_count() - sum(
            p.numel() for name, p in self.named_parameters() if name.endswith(tables))
        return 6 * N + 12 * c.n_layer * c.n_embd * c.block_size
