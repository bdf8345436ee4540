"""Recurrent networks: a state that is carried from token to token, instead of a fixed context.

    model = Recurrent(vocab_size, cell="lstm", layers=2, width=200)
    losses, state = model.advance(tokens, targets, state)    # the state goes into the next call

Each token moves the state h to a new one, from which the next token is predicted. The three cells
differ in how they move it. Elman's (1990) squeezes the input and the old state through a tanh, so
that what was seen fades at each step, and its gradient with it. The LSTM (Hochreiter, Schmidhuber
1997) keeps a second state c that is only multiplied and added to, under the control of gates. The
GRU (Cho et al. 2014) does with one state and fewer gates. Below are their equations, for reading
and for a test: the model runs torch's own modules, which compute the same faster.

Training is truncated back-propagation through time: a batch continues the text of the batch before
it, from its last state, but gradients stop at the batch's beginning (the state is detached).
Dropout is that of Zaremba et al. 2014, arXiv:1409.2329: on what goes up from layer to layer, never
on the state. The head is the token embedding (Press, Wolf 2017), which halves the parameters of a
model of words.
Sizes: B batch, T time, C channels (width), L layers, V vocabulary.
"""

import math

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ladder.sampled import token_losses

CELLS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
ROW = 2**14  # `losses` reads longer texts as several rows,
WARM_UP = 1024  # each after so many tokens that only bring up its state
CHUNK = 512  # tokens per row that `losses` reads at once


# ---------------------------------------------------------------------- the equations

# w_x (k C, C) and w_h (k C, C) hold the matrices of a cell's k gates, one below the other, b_x and
# b_h (k C,) their biases, all in torch's order. x, h, c: (B, C).


def rnn_cell(x, h, w_x, w_h, b_x, b_h):
    """Return the next state of Elman's network: h' = tanh(W x + U h + b)."""
    return torch.tanh(x @ w_x.T + b_x + h @ w_h.T + b_h)  # (B, C)


def gru_cell(x, h, w_x, w_h, b_x, b_h):
    """Return the next state of a GRU: a mixture of the old state and a candidate."""
    x_reset, x_update, x_candidate = (x @ w_x.T + b_x).chunk(3, -1)  # each (B, C)
    h_reset, h_update, h_candidate = (h @ w_h.T + b_h).chunk(3, -1)  # each (B, C)
    reset = torch.sigmoid(x_reset + h_reset)  # (B, C): what the candidate sees of the old state
    update = torch.sigmoid(x_update + h_update)  # (B, C): how much of the old state stays
    candidate = torch.tanh(x_candidate + reset * h_candidate)  # (B, C)
    return update * h + (1 - update) * candidate  # (B, C)


def lstm_cell(x, h, c, w_x, w_h, b_x, b_h):
    """Return the next states (h, c) of an LSTM."""
    # what each gate says, from the input and the old state
    gates = x @ w_x.T + b_x + h @ w_h.T + b_h  # (B, 4 C)
    write, keep, candidate, show = gates.chunk(4, -1)  # each (B, C): input, forget, cell, output
    # keep some of the cell and write some; then show some of it
    c = torch.sigmoid(keep) * c + torch.sigmoid(write) * torch.tanh(candidate)  # (B, C)
    h = torch.sigmoid(show) * torch.tanh(c)  # (B, C)
    return h, c


# ---------------------------------------------------------------------- the model


class Recurrent(nn.Module):
    """Embedding, layers of a recurrent cell, and the embedding again as the head.

    A state is a tensor (L, B, C); of an LSTM a pair of them, h and c; None: all zeros.
    """

    sampler = None  # for training with a large vocabulary: sampled.py

    def __init__(self, vocab_size, cell="lstm", layers=2, width=200, dropout=0.0):
        super().__init__()
        # torch warns of dropout between layers where there is only one
        self.dropout = nn.Dropout(dropout)
        between_layers = dropout if layers > 1 else 0.0
        self.cells = CELLS[cell](width, width, layers, batch_first=True, dropout=between_layers)
        self.head = nn.Linear(width, vocab_size)  # its matrix is the embedding too
        self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Draw from U(-s, s) with s = 1 / sqrt(C), and 0.1 for the embedding; biases are 0, but a
        forget gate starts open (Jozefowicz et al. 2015)."""
        scale = 1 / math.sqrt(self.cells.hidden_size)
        for p in self.parameters():
            if p.dim() == 2:
                p.uniform_(-scale, scale)
            else:
                p.zero_()
        self.head.weight.uniform_(-0.1, 0.1)
        if isinstance(self.cells, nn.LSTM):
            # the forget gates are the second quarter of an LSTM's biases
            for name, p in self.cells.named_parameters():
                if name.startswith("bias_ih"):
                    p.chunk(4)[1].fill_(1.0)

    def hidden(self, tokens, state=None):
        """Return (hidden states (B, T, C), the state after the last token) of tokens (B, T)."""
        # dropout before the first layer, between layers (cells does that), and after the last
        x = self.dropout(F.embedding(tokens, self.head.weight))  # (B, T, C)
        x, state = self.cells(x, state)  # (B, T, C), (L, B, C)
        return self.dropout(x), state

    def advance(self, tokens, targets, state=None):
        """Return (losses (B, T) in nats, the state after the last token, without its gradient)."""
        x, state = self.hidden(tokens, state)  # (B, T, C)
        return token_losses(self, x, targets), detached(state)

    def forward(self, tokens, targets):
        """Return the losses (B, T) of texts that begin here, as model.GPT's forward does."""
        return self.advance(tokens, targets)[0]

    # ------------------------------------------------------------------ as every rung has it

    @torch.no_grad()
    def losses(self, tokens):
        """Return the nats (N - 1,), float64, of each token but the first, given all before it.

        The state is carried from beginning to end. Of a text of more than ROW tokens, parts are
        read side by side: the state of a part comes from the WARM_UP tokens before it.
        """
        # the parts: row r predicts the targets r * length + 1 to (r + 1) * length
        count = len(tokens) - 1
        rows = math.ceil(count / ROW)
        length, warm_up = math.ceil(count / rows), WARM_UP if rows > 1 else 0
        firsts = np.arange(rows) * length  # (rows,)
        starts = (firsts - warm_up).clip(0)  # (rows,); the first row needs no warm-up
        places = starts[:, None] + np.arange(warm_up + length)  # (rows, warm_up + length)
        places = places.clip(max=count - 1)  # the end of the last row is cut off below
        # chunk by chunk, with the state carried
        tokens, losses, state = np.asarray(tokens, np.int64), [], None
        for chunk in np.split(places, range(CHUNK, warm_up + length, CHUNK), axis=1):
            inputs, targets = self.on_device(tokens[chunk]), self.on_device(tokens[chunk + 1])
            here, state = self.advance(inputs, targets, state)
            losses.append(here.double().cpu())
        losses = torch.cat(losses, 1).numpy()  # (rows, warm_up + length)
        own = [row[skip:skip + length] for row, skip in zip(losses, firsts - starts, strict=True)]
        return np.concatenate(own)[:count]

    def on_device(self, ids):
        return torch.as_tensor(ids).to(self.head.weight.device)

    def start(self):
        """Return the state before any token."""
        return None

    @torch.no_grad()
    def step(self, token_id, state):
        """Return (log-probabilities of the next token (V,), float64, the new state)."""
        x, state = self.hidden(self.on_device([[token_id]]), state)  # (1, 1, C)
        return F.log_softmax(self.head(x)[0, 0].double(), -1).cpu().numpy(), state

    def size(self):
        return sum(p.numel() for p in self.parameters()), "parameters"


def detached(state):
    """Return a state without its gradient, so that back-propagation ends there."""
    if isinstance(state, tuple):
        return tuple(part.detach() for part in state)
    return state.detach()
