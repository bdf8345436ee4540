"""inference/generate.py: what is drawn, cached and uncached, compiled or not, when it stops."""

import math
from functools import partial

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from inference import generate as generation
from inference.generate import Batch, cast_weights, decode_and_sample, generate
from inference.sampling import Sampling, sample_ids, stack_settings
from model import GPT, GPTConfig
from runtime.processes import Runtime

CPU = Runtime(torch.device("cpu"), torch.float32)
V, BLOCK = 11, 7
END = V - 1  # the id of end of text


class Scripted:
    """Stands in for a model: `script(number of the step)` gives the logits; keeps the windows."""

    def __init__(self, script, block_size=BLOCK):
        self.config = GPTConfig(block_size=block_size)
        self.script, self.seen, self.window = script, [], []

    def make_cache(self, batch_size, dtype, length):
        return [(torch.zeros(batch_size, 1, self.config.block_size, 1, dtype=dtype),) * 2]

    def hidden(self, tokens, cache, start):
        self.window = self.window[:start] + tokens[0].tolist()
        assert len(self.window) == start + tokens.shape[1]
        return torch.zeros(*tokens.shape, 1)

    def head(self, x):
        self.seen.append(self.window)
        return torch.as_tensor(self.script(len(self.seen) - 1), dtype=torch.float32).expand(
            len(x), -1)


def run_scripted(model, ids=(1,), count=5, temperature=0.0, top_k=0, seed=1, vocab_size=V,
                 end_of_text=END):
    sampling = Sampling(temperature, top_k, 1.0, vocab_size)
    generators = [torch.Generator().manual_seed(seed)]
    steps = generate(model, [ids], generators, count, sampling, end_of_text, CPU)
    return [token for token, in steps]


def only(token, size=V):
    return [100.0 if i == token else 0.0 for i in range(size)]


def test_greedy_takes_the_likeliest():
    model = Scripted(lambda step: only([3, 0, 9][step]))
    assert run_scripted(model, count=3) == [3, 0, 9]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_end_of_text_ends_a_sample_and_is_not_given(temperature):
    model = Scripted(lambda step: only([3, 5, END, 4][step]))
    assert run_scripted(model, count=4, temperature=temperature) == [3, 5]
    no_end = Scripted(lambda step: only(2, 3))
    assert run_scripted(no_end, count=4, vocab_size=3, end_of_text=None) == [2] * 4


@pytest.mark.parametrize(("temperature", "top_k"), [(0.0, 0), (1.0, 0), (1.0, 200), (5.0, 3)])
def test_ids_that_only_pad_the_vocabulary_are_never_drawn(temperature, top_k):
    logits = [0.0] * 10 + [-100.0] + [50.0] * 6  # 11 tokens, end of text unlikely, 6 of padding
    model = Scripted(lambda step: logits)
    assert max(run_scripted(model, count=50, temperature=temperature, top_k=top_k)) < V - 1


def window_length(length, prompt, block_size=BLOCK):
    """The rule in a loop: how many of `length` tokens the model sees, after a prompt."""
    seen = min(prompt, block_size)
    for _ in range(length - prompt):
        seen = seen + 1 if seen < block_size else (block_size + 1) // 2
    return seen


@pytest.mark.parametrize("prompt", [1, 5, BLOCK, 10])
def test_what_the_model_sees_is_a_block_of_which_half_is_forgotten_when_it_is_full(prompt):
    model = Scripted(lambda step: only(step % 10))
    whole = list(range(10))[-prompt:] + [n % 10 for n in range(19)]
    assert run_scripted(model, whole[:prompt], count=19) == whole[prompt:]
    assert model.seen == [whole[end - window_length(end, prompt):end]
                          for end in range(prompt, prompt + 19)]
    assert min(len(seen) for seen in model.seen[BLOCK:]) == (BLOCK + 1) // 2
    for block_size in (1, 2):
        model = Scripted(lambda step: only(step % 10), block_size)
        assert run_scripted(model, count=4) == [0, 1, 2, 3]
        assert [len(seen) for seen in model.seen] == [[1, 1, 1, 1], [1, 2, 1, 2]][block_size - 1]


def random_model(bias=True, seed=1, rows=16, layers=2):
    """A tiny model whose likeliest token is not the last one; 11 tokens and 5 of padding."""
    model = GPT(GPTConfig(block_size=BLOCK, vocab_size=rows, n_layer=layers, n_head=3, n_embd=21,
                          bias=bias), torch.Generator().manual_seed(seed))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return model.eval()


def run_model(model, ids, count, seeds, temperature=0.0, compiled=False, runtime=CPU):
    """The new tokens of each sample; without an end of text."""
    sampling = Sampling(temperature, 0, 1.0, V)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    prompts = [ids] * len(seeds)
    steps = generate(model, prompts, generators, count, sampling, None, runtime, compiled)
    return [list(row) for row in zip(*steps, strict=True)]


@torch.no_grad()
def uncached(model, ids, count, seed, temperature):
    ids, prompt, generator = list(ids), len(ids), torch.Generator().manual_seed(seed)
    for _ in range(count):
        seen = torch.tensor([ids[-window_length(len(ids), prompt):]])
        uniform = torch.rand(1, dtype=torch.float64, generator=generator)
        new_ids, _ = sample_ids(model.logits(seen)[:, -1], uniform,
                                stack_settings([Sampling(temperature, 0, 1.0, V)], "cpu"))
        ids.append(int(new_ids))
    return ids[prompt:]


@pytest.mark.parametrize("decoding", ["as it is", "of fixed shapes", "of fixed shapes, traced"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("prompt", [1, 5, BLOCK, 11])
@pytest.mark.parametrize("bias", [True, False])
def test_cached_and_batched_sampling_is_uncached_sampling_past_the_block(bias, prompt, temperature,
                                                                         decoding, monkeypatch):
    if decoding == "of fixed shapes":
        monkeypatch.setattr(generation.torch, "compile", lambda step, **options: step)
    elif decoding == "of fixed shapes, traced":
        compile_function = torch.compile
        monkeypatch.setattr(generation.torch, "compile", lambda step, **options: compile_function(
            step, backend="eager", fullgraph=True))
    model, ids, count = random_model(bias), [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5][:prompt], 23
    seeds = (1, 2, 3)
    expected = [uncached(model, ids, count, seed, temperature) for seed in seeds]
    assert len(set(expected[0])) > 2 and max(map(max, expected)) < V
    assert (expected[0] == expected[1]) == (temperature == 0)
    run = partial(run_model, model, ids, count, temperature=temperature,
                  compiled=decoding != "as it is")
    assert run(seeds) == expected
    assert run(seeds[1:2]) == expected[1:2]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_text_is_the_same_alone_and_among_others_that_begin_and_end_when_they_like(
        compiled, monkeypatch):
    """Sequences of unequal length, each with a seed and settings of its own, join and leave."""
    monkeypatch.setattr(generation.torch, "compile", lambda step, **options: step)
    model, count = random_model(), 13
    digits = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    jobs = []  # (prompt, settings, seed)
    for seed, length in enumerate((1, 5, 11, 5, 7, 2)):
        sampling = Sampling([0.0, 1.0, 2.0][seed % 3], [0, 7][seed % 2], [0.9, 1.0][seed // 3], V,
                            [0.0, 0.05][seed % 2], [1.0, 1.3][seed // 4])
        jobs.append((digits[:length], sampling, seed))

    def write(batch, job):
        prompt, sampling, seed = job
        return batch.add(prompt, sampling, torch.Generator().manual_seed(seed))

    alone = []
    for job in jobs:
        batch = Batch(model, 1, CPU)
        write(batch, job)
        alone.append([batch.step()[0] for _ in range(count)])
    assert len({tuple(text) for text in alone}) == len(jobs)

    # Three rows: a new sequence every two steps, where there is room.
    batch, waiting, texts, job_of = Batch(model, 3, CPU, compiled), list(enumerate(jobs)), {}, {}
    for step in range(200):
        if waiting and None in batch.sequences and step % 2 == 0:
            number, job = waiting.pop(0)
            job_of[write(batch, job)] = number
        if not any(batch.sequences):
            continue
        for row, new_id in enumerate(batch.step()):
            assert (new_id is None) == (batch.sequences[row] is None)
            if new_id is not None:
                text = texts.setdefault(job_of[row], [])
                text.append(new_id)
                if len(text) == count:
                    batch.remove(row)
    assert [texts[number] for number in range(len(jobs))] == alone


def test_a_sample_that_has_ended_leaves_the_others_as_they_are():
    model = random_model()

    def run(seeds, end_of_text):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        steps = generate(model, [[3, 1]] * 3, generators, 13, Sampling(1.0, 0, 1.0, V),
                         end_of_text, CPU)
        return list(zip(*steps, strict=True))

    rows = run((1, 2, 3), None)
    end_of_text = rows[0][4]
    for row, ended in zip(rows, run((1, 2, 3), end_of_text), strict=True):
        end = row.index(end_of_text) if end_of_text in row else 13
        assert ended == row[:end] + (None,) * (len(ended) - end)


def test_bfloat16_sampling_runs_and_its_matrices_are_converted_once():
    runtime = Runtime(torch.device("cpu"), torch.bfloat16)
    model = random_model()
    expected = model.logits(torch.tensor([[3, 1, 4]]))
    cast_weights(model, torch.bfloat16)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert dtypes["transformer.wte.weight"] == torch.bfloat16
    assert dtypes["transformer.h.0.mlp.c_fc.weight"] == torch.bfloat16
    assert dtypes["transformer.wpe.weight"] == dtypes["transformer.ln_f.weight"] == torch.float32
    rows = run_model(model, [3, 1], 23, (1, 2), 1.0, runtime=runtime)
    assert len(rows[0]) == 23 and max(map(max, rows)) < V
    with runtime.autocast():
        logits = model.logits(torch.tensor([[3, 1, 4]]))
    torch.testing.assert_close(logits.float(), expected, rtol=0.05, atol=0.3)


def test_an_untied_embedding_stays_float32_and_with_it_the_residual_stream():
    model = GPT(GPTConfig(block_size=BLOCK, vocab_size=V, n_layer=2, n_head=3, n_embd=24, rope=True,
                          rmsnorm=True, tied=False, bias=False)).eval()
    cast_weights(model, torch.bfloat16)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert dtypes.pop("transformer.wte.weight") == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):
        assert model.hidden(torch.tensor([[3, 1, 4]])).dtype == torch.float32


def draw_one(logits, temperature, top_k, generator, top_p=1.0):
    uniform = torch.rand(1, dtype=torch.float64, generator=generator)
    sampling = Sampling(temperature, top_k, top_p, len(logits))
    ids, _ = sample_ids(torch.as_tensor(logits)[None], uniform, stack_settings([sampling], "cpu"))
    return int(ids)


def frequencies(logits, temperature, top_k, count=2000, top_p=1.0):
    generator = torch.Generator().manual_seed(1)
    drawn = [draw_one(logits, temperature, top_k, generator, top_p) for _ in range(count)]
    return [drawn.count(i) / count for i in range(len(logits))]


@pytest.mark.parametrize(("top_p", "kept"), [
    (1e-9, {1}), (0.39, {1}), (0.41, {1, 3}), (0.69, {1, 3}), (0.71, {1, 2, 3}),
    (0.95, {0, 1, 2, 3}), (1.0, {0, 1, 2, 3})])
def test_top_p_keeps_the_fewest_tokens_that_have_that_probability(top_p, kept):
    shares = [0.1, 0.4, 0.2, 0.3]
    total = sum(shares[i] for i in kept)
    found = frequencies([math.log(p) for p in shares], 1.0, 0, top_p=top_p)
    assert found == pytest.approx([p / total * (i in kept) for i, p in enumerate(shares)], abs=0.05)
    assert {i for i, share in enumerate(found) if share} == kept


def test_top_p_is_a_share_of_the_top_k():
    logits = [math.log(p) for p in (0.1, 0.4, 0.2, 0.3)]
    assert frequencies(logits, 1.0, 2, top_p=0.56) == [0, 1, 0, 0]  # 4/7 of those two
    assert frequencies(logits, 1.0, 2, top_p=0.58)[3] > 0.3


def test_each_uniform_number_is_looked_up_in_the_cumulative_distribution():
    logits = torch.tensor([[math.log(p) for p in (0.25, 0.5, 0.25)] + [-math.inf]]).expand(5, -1)
    uniforms = torch.tensor([0.0, 0.2, 0.3, 0.7, 1 - 2**-53], dtype=torch.float64)
    settings = stack_settings([Sampling(1.0, 0, 1.0, 4)] * 5, "cpu")
    ids, is_finite = sample_ids(logits, uniforms, settings)
    assert ids.tolist() == [0, 0, 1, 1, 2] and not is_finite


def test_samples_follow_the_softmax_over_the_top_k():
    logits = [math.log(p) for p in (0.1, 0.4, 0.2, 0.3)]
    assert frequencies(logits, 1.0, 0) == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=0.05)
    assert frequencies(logits, 1.0, 99) == frequencies(logits, 1.0, 0)
    assert frequencies(logits, 1.0, 2) == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.05)
    squares = [0.01, 0.16, 0.04, 0.09]
    assert frequencies(logits, 0.5, 0) == pytest.approx([p / 0.3 for p in squares], abs=0.05)


def test_top_k_keeps_what_is_as_probable_as_its_last():
    assert sum(share > 0 for share in frequencies([1.0] * 5 + [0.0], 1.0, 2, count=300)) == 5


def test_top_1_is_greedy():
    for seed in range(30):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randint(4, (V,), generator=generator).float()  # with equals
        assert draw_one(logits, 1.0, 1, generator) == draw_one(logits, 0.0, 0, generator)


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-320])
def test_a_tiny_temperature_does_not_overflow(temperature):
    for top_k in (0, 3):
        logits = torch.tensor([-3e4, 3e4, 2.9e4, 0.0])
        assert draw_one(logits, temperature, top_k, torch.Generator().manual_seed(1)) == 1


def test_logits_that_are_not_finite_are_an_error():
    for bad in (math.nan, math.inf):
        model = Scripted(lambda step, bad=bad: [bad] + [0.0] * (V - 1))
        with pytest.raises(ValueError, match="not finite.*training diverged.*--dtype=float32"):
            run_scripted(model)


def test_compiled_decoding_keeps_its_cache_from_batch_to_batch(monkeypatch):
    """A CUDA graph has its address."""
    caches = []

    def compile_function(step, **options):
        return lambda model, tokens, cache, *rest: caches.append(cache) or step(
            model, tokens, cache, *rest)

    monkeypatch.setattr(generation.torch, "compile", compile_function)
    model = random_model()
    first = run_model(model, [3, 1], 5, (1, 2), compiled=True)
    run_model(model, [5], 5, (3,), compiled=True)
    assert run_model(model, [3, 1], 5, (1, 2), compiled=True) == first
    assert len(caches) == 15 and len({id(cache) for cache in caches[:5] + caches[10:]}) == 1


def test_a_decoding_step_writes_into_the_cache_and_does_not_copy_it():
    """A write through a view of a larger tensor is a copy of all of it, once it is traced."""
    targets = []

    def note(graph, inputs):
        targets.extend(str(node.target) for node in graph.graph.nodes)
        return make_boxed_func(graph.forward)

    torch._dynamo.reset()
    step = torch.compile(decode_and_sample, fullgraph=True, backend=aot_autograd(fw_compiler=note))
    model = random_model()
    with torch.no_grad():
        step(model, torch.tensor([[1], [2]]), model.make_cache(2), torch.tensor([5, 2]),
             torch.zeros(2), stack_settings([Sampling(0.0, 0, 1.0, V)] * 2, "cpu"), None, CPU)
    assert targets.count("aten.index_put.default") == 4  # two layers
    assert not [target for target in targets if "scatter" in target]
