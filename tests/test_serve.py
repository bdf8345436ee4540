"""serve.py and serving/: answers by OpenAI's own client, many at once, wrong requests, the runs,
the page."""

import http.client
import json
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from conftest import ROOT
from test_sample import BLOCK, BYTES, set_logits, write_checkpoint

import serve
from formats.checkpoint import load_model
from inference.generate import generate
from inference.sampling import Sampling
from runtime.processes import setup
from runtime.seeds import seed_for
from serving.api import Api
from serving.app import make_app
from serving.engine import Drawn, Engine
from serving.requests import Limits, Refusal, read_chat, read_completion
from serving.runs import MAX_POINTS, describe_run, list_runs
from serving.token_stream import TokenStream
from text.chat import SPECIAL, render
from text.tokenizer import Tokenizer

openai = pytest.importorskip("openai", reason="needs the openai package, of requirements-test.txt")
uvicorn = pytest.importorskip("uvicorn", reason="needs uvicorn and starlette")

CHAT = Tokenizer({"kind": "bytes", "special": SPECIAL})  # 263 tokens
RUNTIME = setup("cpu", "float32")


class Server:
    """A server on a free port, in a thread."""

    def __init__(self, folder, tokenizer, slots=5, token="", runs="out", hosts=None):
        self.tokenizer = tokenizer
        self.model = load_model(folder).eval()
        self.listener = serve.listen("127.0.0.1", 0)
        self.port = self.listener.getsockname()[1]
        self.engine = Engine(self.model, RUNTIME, slots, max_waiting=23)
        api = Api("tiny", tokenizer, self.engine, max_new_tokens=10**5, max_seconds=60)
        self.server = serve.make_server(
            make_app(api, runs, serve.allowed_hosts("127.0.0.1"), token))
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", max_retries=0,
                                    api_key=token or "none", timeout=60)

    def __enter__(self):
        self.engine.__enter__()
        self.thread = threading.Thread(target=self.server.run, args=[[self.listener]])
        self.thread.start()
        return self

    def __exit__(self, *exception):
        self.client.close()
        self.server.should_exit = True
        self.thread.join()
        self.engine.__exit__()

    def ask(self, method, path, body=None, **headers):
        """Return (status, body) of a request; a body that is a dict is sent as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        if isinstance(body, dict):
            body = json.dumps(body)
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, body, headers)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        if response.headers["Content-Type"] == "application/json":
            text = json.loads(text)
        return response.status, text

    def complete(self, prompt="abc", **settings):
        settings = {"max_tokens": 13, "seed": 1, **settings}
        return self.client.completions.create(model="tiny", prompt=prompt, **settings)

    def alone(self, prompt_ids, seed, max_new_tokens=13, number=0, temperature=1.0):
        """Return the ids that sample.py draws with the same settings, as its sample `number`."""
        generator = torch.Generator().manual_seed(seed_for(seed, "sample", number))
        sampling = Sampling(temperature, 0, 1.0, self.tokenizer.vocab_size)
        steps = generate(self.model, [prompt_ids], [generator], max_new_tokens, sampling,
                         self.tokenizer.eot, RUNTIME)
        return [new_id for new_id, in steps]

    def wait_until_idle(self):
        for _ in range(500):
            if not self.engine.active and not self.engine.waiting:
                return
            time.sleep(0.01)
        raise AssertionError("a slot was not freed")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    with Server(write_checkpoint(folder, BYTES), BYTES) as running:
        yield running


@pytest.fixture(scope="module")
def chat_server(tmp_path_factory):
    """Its model says "No" and ends its turn."""
    folder = write_checkpoint(tmp_path_factory.mktemp("model") / "tiny", CHAT, block_size=101)
    with Server(folder, CHAT) as running:
        yield running


# ---------------------------------------------------------------------- answers


def test_an_answer_is_what_sample_py_draws(server):
    answer = server.complete("abc", n=3, max_tokens=29, seed=5)
    assert 29 > BLOCK  # the window moves too
    for choice in answer.choices:
        ids = server.alone(BYTES.encode_prompt("abc"), 5, 29, choice.index)
        assert choice.text == BYTES.decode(ids)
        assert choice.finish_reason == ("length" if len(ids) == 29 else "stop")
    assert len({choice.text for choice in answer.choices}) == 3
    assert answer.usage.prompt_tokens == 3 and answer.usage.completion_tokens <= 87


def test_prompts_may_be_several_and_token_ids(server):
    both = server.complete(["abc", "bcd"], n=2).choices
    ids = server.complete([[97, 98, 99], [98, 99, 100]], n=2).choices
    assert [choice.text for choice in both] == [choice.text for choice in ids]
    assert [choice.index for choice in both] == [0, 1, 2, 3]
    assert both[2].text == server.complete("bcd").choices[0].text != both[0].text
    assert server.complete([97, 98, 99]).choices[0].text == both[0].text


def test_a_stream_is_the_answer(server):
    settings = {"n": 2, "max_tokens": 17, "logprobs": 3}
    whole = server.complete(**settings)
    chunks = list(server.complete(**settings, stream=True, stream_options={"include_usage": True}))
    assert chunks.pop().usage == whole.usage
    for choice in whole.choices:
        parts = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert "".join(part.text for part in parts) == choice.text
        assert [part.finish_reason for part in parts[:-1]] == [None] * (len(parts) - 1)
        assert parts[-1].finish_reason == choice.finish_reason
        for key in ("tokens", "token_logprobs", "text_offset"):
            joined = [value for part in parts for value in getattr(part.logprobs, key)]
            assert joined == pytest.approx(getattr(choice.logprobs, key))
        runners_up = [each for part in parts for each in part.logprobs.top_logprobs]
        for streamed, collected in zip(runners_up, choice.logprobs.top_logprobs, strict=True):
            assert streamed == pytest.approx(collected)


def test_log_probabilities_are_the_models_own(server):
    answer = server.complete("abc", max_tokens=2, temperature=0.5, logprobs=4).choices[0].logprobs
    with torch.no_grad():
        logits = server.model.logits(torch.tensor([BYTES.encode_prompt("abc")]))[0, -1]
    expected = logits[:BYTES.vocab_size].log_softmax(-1)
    first = server.alone([97, 98, 99], 1, 1, temperature=0.5)[0]
    assert answer.token_logprobs[0] == pytest.approx(float(expected[first]), abs=1e-5)
    best = list(answer.top_logprobs[0].values())
    assert best == pytest.approx(expected.topk(4).values.tolist(), abs=1e-5)


def test_a_seed_is_drawn_where_none_is_given(server):
    texts = {server.complete(seed=None).choices[0].text for _ in range(2)}
    assert len(texts) == 2
    assert server.complete(temperature=0, seed=1).choices[0].text == \
        server.complete(extra_body={"top_k": 1}, seed=2).choices[0].text


def test_many_clients_are_answered_together_and_alike(server):
    seeds = range(10)
    expected = [BYTES.decode(server.alone([97 + seed], seed, 41)) for seed in seeds]
    steps = server.engine.counts["steps"]
    generated = server.engine.counts["generated_tokens"]

    def ask(seed):
        parts = server.complete(chr(97 + seed), seed=seed, max_tokens=41, stream=True)
        return "".join(part.choices[0].text for part in parts)

    with ThreadPoolExecutor(10) as clients:
        assert list(clients.map(ask, seeds)) == expected
    generated = server.engine.counts["generated_tokens"] - generated
    assert server.engine.counts["steps"] - steps < generated  # or none were together


def test_a_client_that_leaves_frees_its_slots(server):
    for wait_for_first in (True, False):
        stream = server.client.completions.create(
            model="tiny", prompt="abc", max_tokens=10**5, n=11, stream=True, temperature=0)
        if wait_for_first:
            next(iter(stream))
        stream.close()
        server.wait_until_idle()
    # one that does not stream: it has sent its request, and hangs up
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    body = {"max_tokens": 10**5, "n": 11, "temperature": 0}
    connection.request("POST", "/v1/completions", json.dumps(body))
    connection.close()
    time.sleep(0.05)
    server.wait_until_idle()


def test_too_many_answers_at_once_are_refused(server):
    with pytest.raises(openai.BadRequestError, match="at most 23 answers"):
        server.complete(["a", "b"], n=12)
    slow = server.complete(n=23, max_tokens=300, stream=True)
    next(iter(slow))
    with pytest.raises(openai.InternalServerError, match="busy"):
        server.complete(n=23)
    slow.close()
    server.wait_until_idle()


# ---------------------------------------------------------------------- text


def drawn(token_id):
    return Drawn(token_id, -1.0, [])


@pytest.mark.parametrize("stop", [[], ["b"], ["é€"], ["ab", "bc"], ["aab"], ["€a", "aaaa"]])
def test_text_ends_before_the_first_stop_string(stop):
    rng = random.Random(1)
    for _ in range(50):
        text = "".join(rng.choices("aab€é", k=11))
        stream, sent = TokenStream(BYTES, stop), []
        for token_id in BYTES.encode(text).tolist():
            sent += stream.add(drawn(token_id))
            if stream.has_stopped:
                break
        else:
            sent += stream.end()
        assert "".join(token.text for token in sent) == cut(text, stop), text


def cut(text, stop):
    """Return a text up to the stop string that is complete first."""
    for end in range(1, len(text) + 1):
        found = [text[:end].find(each) for each in stop if each in text[:end]]
        if found:
            return text[:min(found)]
    return text


def test_text_is_sent_as_soon_as_it_is_certain():
    stream, pieces = TokenStream(BYTES, ["abd"]), []
    for token_id in BYTES.encode("xabcé").tolist():
        pieces.append("".join(token.text for token in stream.add(drawn(token_id))))
    assert pieces == ["x", "", "", "abc", "", "é"]
    half = TokenStream(BYTES)
    assert half.add(drawn(0xc3)) == []
    assert [token.text for token in half.end()] == ["\N{REPLACEMENT CHARACTER}"]


def test_stop_strings_of_a_request(server):
    text = server.complete(max_tokens=40, seed=3).choices[0].text
    stop = text[5:7]
    short = server.complete(max_tokens=40, seed=3, stop=[stop, "\x00\x01"], logprobs=0).choices[0]
    assert short.finish_reason == "stop" and short.text == text[:text.index(stop)]
    assert "".join(short.logprobs.tokens) == short.text


# ---------------------------------------------------------------------- conversations

MESSAGES = [{"role": "developer", "content": "Be short."},
            {"role": "user", "content": [{"type": "text", "text": "Is it é?"}]}]


def test_a_conversation_is_rendered_as_in_training():
    from documents.conversations import Message

    wanted = read_chat({"messages": MESSAGES}, "tiny", CHAT, Limits(7, 1, 101))
    ids, _ = render([Message("system", "Be short."), Message("user", "Is it é?")], CHAT)
    assert wanted.prompts == [[*ids, CHAT.special["<|assistant|>"]]]
    assert wanted.max_new_tokens == 7 and wanted.runners_up is None


def test_the_assistant_answers(chat_server):
    chat = chat_server.client.chat.completions.create
    settings = {"model": "tiny", "messages": MESSAGES, "seed": 1, "max_completion_tokens": 19,
                "logprobs": True, "top_logprobs": 2}
    whole = chat(**settings)
    message, content = whole.choices[0].message, whole.choices[0].logprobs.content
    assert message.role == "assistant" and message.content
    assert "".join(token.token for token in content) == message.content
    assert {len(token.top_logprobs) for token in content} == {2}
    parts = [chunk.choices[0] for chunk in chat(**settings, stream=True)]
    assert "".join(part.delta.content for part in parts) == message.content
    assert [part.delta.role for part in parts] == ["assistant"] + [None] * (len(parts) - 1)
    assert parts[-1].finish_reason == whole.choices[0].finish_reason


def test_an_answer_ends_with_the_message(tmp_path):
    folder = write_checkpoint(tmp_path / "tiny", CHAT, block_size=101)
    set_logits(folder, [float(i == CHAT.special["<|end|>"]) for i in range(263)])
    with Server(folder, CHAT) as server:
        answer = server.client.chat.completions.create(model="tiny", messages=MESSAGES,
                                                       temperature=0).choices[0]
    assert answer.message.content == "" and answer.finish_reason == "stop"


# ---------------------------------------------------------------------- wrong requests


@pytest.mark.parametrize("body, status, message", [
    ('{"prompt": ', 400, "the body is not JSON"),
    ("[1]", 400, "the body is not a JSON object"),
    ("[" * 100_000, 400, "the body is not JSON"),
    (b"\xff", 400, "the body is not JSON"),
    ({"model": "gpt-9"}, 404, "the model 'gpt-9' does not exist; this server has 'tiny'"),
    ({"modle": 1}, 400, "modle: unknown key"),
    ({"messages": []}, 400, "messages: unknown key"),
    ({"echo": True}, 400, "echo: not supported"),
    ({"temperature": -0.1}, 400, "temperature=-0.1: must be a number from 0 to 2"),
    ({"temperature": float("nan")}, 400, "temperature=nan: must be a number from 0 to 2"),
    ({"temperature": "1"}, 400, "temperature='1': must be a number"),
    ({"top_p": 0}, 400, "top_p=0: must be a number"),
    ({"top_k": 1.5}, 400, "top_k=1.5: must be a whole number"),
    ({"n": True}, 400, "n=True: must be a whole number from 1 to 23"),
    ({"n": 0}, 400, "n=0: must be"),
    ({"max_tokens": 10**6}, 400, "max_tokens=1000000: must be a whole number from 1 to 100000"),
    ({"logprobs": 21}, 400, "logprobs=21: must be a whole number from 0 to 20"),
    ({"seed": 2**70}, 400, "seed="),
    ({"stream": 1}, 400, "stream=1: must be true or false"),
    ({"stream_options": 1}, 400, "stream_options: must be an object"),
    ({"stop": [""]}, 400, "stop: must be a text"),
    ({"stop": ["a"] * 5}, 400, "stop: must be a text"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty=0: must be a number from 0.1 to 10"),
    ({"prompt": None}, 400, "prompt: must be a text"),
    ({"prompt": []}, 400, "prompt: must be a text"),
    ({"prompt": [True]}, 400, "prompt: token ids must be whole numbers from 0 to 256"),
    ({"prompt": [[257]]}, 400, "prompt: token ids must be"),
    ({"prompt": "\ud800"}, 400, "prompt: not a text that UTF-8 can hold"),
    ({"prompt": "a" * (BLOCK + 1)}, 400,
     f"the prompt has {BLOCK + 1} tokens, and the model reads at most {BLOCK}"),
    ("x" * (2**20 + 1), 413, "the body is larger than"),
])
def test_wrong_requests_for_a_completion(server, body, status, message):
    found, answer = server.ask("POST", "/v1/completions", body)
    assert (found, answer["error"]["message"][:len(message)]) == (status, message)


@pytest.mark.parametrize("messages, message", [
    (None, "messages: must be a list"), ([], "messages: must be a list"),
    ([1], "messages, message 1: a number, not an object"),
    ([{"role": "narrator", "content": "a"}], "messages, message 1: unknown role 'narrator'"),
    ([{"role": "user", "content": 5}], "messages, message 1: a number where a text should be"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "messages, message 1: a part of type"),
    ([{"role": "user", "content": "a", "tool_calls": 5}], "messages, message 1: tool_calls is not"),
    ([{"role": "user", "content": "a" * 200}], "the prompt has 204 tokens"),
])
def test_wrong_conversations(chat_server, messages, message):
    status, answer = chat_server.ask("POST", "/v1/chat/completions", {"messages": messages})
    assert (status, answer["error"]["message"][:len(message)]) == (400, message)


def test_a_model_that_knows_no_conversations(server):
    status, answer = server.ask("POST", "/v1/chat/completions", {"messages": MESSAGES})
    assert status == 400 and "was not trained on conversations" in answer["error"]["message"]


def test_characters_beyond_the_vocabulary():
    letters = Tokenizer({"kind": "chars", "alphabet": "abc", "documents": False})
    for prompt, message in (("abX", "lacks 'X'"), ("", "is empty, and this model has no end-of")):
        with pytest.raises(Refusal, match=message):
            read_completion({"prompt": prompt}, "tiny", letters, Limits(1, 1, 5))


def test_unknown_paths_and_methods(server):
    for method, path, status in (("GET", "/v2", 404), ("GET", "/v1/completions", 405)):
        found, answer = server.ask(method, path)
        assert found == status and answer["error"]["message"].startswith(f"{method} {path}: ")


def test_what_the_engine_cannot_do_is_an_error_of_that_request_alone(server, monkeypatch):
    def fail(*arguments):
        raise MemoryError("too little")

    with monkeypatch.context() as patch:
        patch.setattr(server.engine.batch, "step", fail)
        with pytest.raises(openai.InternalServerError, match="MemoryError: too little"):
            server.complete()
    assert server.complete().choices[0].text
    assert server.ask("GET", "/health") == (200, {"status": "ok", "model": "tiny"})


# ---------------------------------------------------------------------- who may ask


def test_pages_of_other_sites_are_refused(server):
    for headers, status in (
            ({"Host": "evil.example"}, 400), ({"Host": f"evil.example:{server.port}"}, 400),
            ({"Origin": "https://evil.example"}, 403), ({"Origin": "null"}, 403),
            ({"Origin": f"http://127.0.0.1:{server.port}"}, 200), ({"Host": "localhost:1"}, 200)):
        assert server.ask("GET", "/v1/models", **headers)[0] == status, headers


def test_a_token(tmp_path):
    folder = write_checkpoint(tmp_path / "tiny", BYTES)
    with Server(folder, BYTES, token="sésame", runs=tmp_path) as server:
        for path in ("/v1/models", "/metrics", "/runs", "/runs/a"):
            for headers in ({}, {"Authorization": "Bearer open"}):
                status, answer = server.ask("GET", path, **headers)
                assert status == 401 and answer["error"]["code"] == "invalid_api_key"
        assert server.ask("GET", "/v1/models",
                          Authorization="Bearer sésame".encode().decode("latin-1"))[0] == 200
        assert server.ask("GET", "/health")[0] == server.ask("GET", "/")[0] == 200


def test_metrics(server):
    server.complete()
    status, text = server.ask("GET", "/metrics")
    counts = dict(line.split() for line in text.splitlines() if not line.startswith("#"))
    assert status == 200 and int(counts["flatgpt_generated_tokens_total"]) > 0
    assert int(counts['flatgpt_requests_total{status="200"}']) > 0
    assert (counts["flatgpt_slots"], counts["flatgpt_slots_in_use"]) == ("5", "0")


# ---------------------------------------------------------------------- runs


def write_run(folder, rows, settings=None):
    folder.mkdir(parents=True)
    lines = [json.dumps(row) for row in rows]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"iter": 9'] ))
    if settings:
        write_checkpoint(folder / "iter_000002", BYTES)
        meta = json.loads((folder / "iter_000002" / "meta.json").read_text())
        (folder / "iter_000002" / "meta.json").write_text(json.dumps({**meta, "config": settings}))
        (folder / "latest").write_text("iter_000002\n")


@pytest.fixture
def runs(tmp_path):
    """Two runs, of which one has a checkpoint, and a file that none may read."""
    write_run(tmp_path / "out" / "one", [
        {"iter": 0, "tokens": 0, "val_loss": 5.0, "val_bpb": 2.5},
        {"iter": 0, "tokens": 7, "loss": 4.0, "ms": 3000},
        {"iter": 10, "tokens": 77, "loss": 3.0, "ms": 6000}, {"iter": 10, "val_loss": "high"},
        {"iter": 10, "loss": float("nan"), "val_bpb": float("inf")}, {"loss": 9.0}],
        {"max_iters": 11, "learning_rate": 0.5})
    write_run(tmp_path / "out" / "zwei é", [{"iter": i, "tokens": i, "loss": 1 / (1 + i)}
                                            for i in range(2 * MAX_POINTS + 2)])
    write_run(tmp_path / "secret", [{"iter": 0, "loss": 0.0}])
    (tmp_path / "metrics.jsonl").write_text('{"iter": 0, "loss": 0.0}')
    (tmp_path / "out" / "empty").mkdir()
    return tmp_path / "out"


def test_runs(runs):
    listed = {run["name"]: run for run in list_runs(runs)}
    assert listed.keys() == {"one", "zwei é"}
    assert 0 <= listed["one"].pop("seconds") < 60
    assert listed["one"] == {"name": "one", "iter": 10, "max_iters": 11, "loss": 3.0,
                             "val_loss": 5.0, "val_bpb": 2.5}
    one = describe_run(runs, "one")
    assert one["settings"] == {"max_iters": 11, "learning_rate": 0.5}
    assert one["curves"]["loss"] == {"iter": [0, 10], "tokens": [7, 77], "value": [4.0, 3.0],
                                     "minutes": [0.05, 1.05]}
    assert one["curves"]["val_loss"]["value"] == [5.0]
    two = describe_run(runs, "zwei é")
    curve = two["curves"]["loss"]
    assert two["settings"] == {} and len(curve["iter"]) <= MAX_POINTS + 1
    assert (curve["iter"][0], curve["iter"][-1]) == (0, 2 * MAX_POINTS + 1)


def test_a_run_that_goes_on_is_read_again(runs):
    with open(runs / "one" / "metrics.jsonl", "a") as file:
        file.write('\n{"iter": 11, "tokens": 84, "loss": 2.0, "ms": 60000}\n')
    assert describe_run(runs, "one")["curves"]["loss"]["minutes"][-1] == 2.05


def test_no_request_opens_a_file_outside_of_the_runs(runs, tmp_path):
    assert describe_run(runs, "../secret") is describe_run(runs, str(tmp_path / "secret")) is None
    folder = write_checkpoint(tmp_path / "tiny", BYTES)
    (runs / "one" / "latest").write_text("../../tiny")
    with Server(folder, BYTES, runs=runs) as server:
        assert server.ask("GET", "/runs/one")[1]["settings"] == {}
        assert server.ask("GET", "/runs/zwei%20%C3%A9")[0] == 200
        for name in ("..", "..%2fsecret", "%2e%2e/secret", "../secret", ".", "one%00", "one/latest",
                     str(runs.parent / "secret").replace("/", "%2f"), "%5c..%5csecret"):
            assert server.ask("GET", f"/runs/{name}")[0] == 404, name


# ---------------------------------------------------------------------- the command


@pytest.mark.parametrize("settings, message", [
    ({"port": 70000}, "port=70000: must be at least 0 and at most 65535"),
    ({"slots": 0}, "slots=0: must be at least 1"),
    ({"host": "0.0.0.0"}, "host='0.0.0.0': other machines could use this server; add --token="),
    ({"host": "no.such.host.invalid", "token": "a"}, "host='no.such.host.invalid', port=0: cannot"),
    ({"out_dir": "nowhere"}, "nowhere: no checkpoint here"),
])
def test_wrong_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        serve.main(**{"port": 0, "device": "cpu", **settings})


def test_the_models_name_is_its_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert serve.model_name("resume", ".") == serve.model_name(".", "") == tmp_path.name
    assert serve.model_name("gpt2", "") == "gpt2"


def test_a_port_in_use():
    with serve.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port={port}: cannot listen there .*another --port="):
            serve.main(port=port)


def test_ctrl_c_ends_it_at_once_with_exit_code_0(tmp_path):
    folder = write_checkpoint(tmp_path / "tiny", BYTES)
    command = [sys.executable, "serve.py", f"--init_from={folder}", "--port=0", "--device=cpu",
               "--max_new_tokens=1000000"]
    with subprocess.Popen(command, cwd=ROOT, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:
        # while an answer is streamed
        line = process.stdout.readline()
        port = int(re.fullmatch(r"tiny is at http://127.0.0.1:(\d+); Ctrl-C .*\n", line)[1])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("POST", "/v1/completions",
                           json.dumps({"max_tokens": 10**6, "stream": True}))
        assert connection.getresponse().read(10)
        process.send_signal(signal.SIGINT)
        rest, errors = process.communicate(timeout=60)
    assert (process.returncode, rest, errors) == (0, "", f"{folder}\n")


# ---------------------------------------------------------------------- the page


@contextmanager
def browser_page(url):
    """Open a page in headless Chromium; without one the test is skipped."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright and Chromium")
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as api:
        browser = api.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800})
        page.errors = []
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.goto(url)
        yield page
        browser.close()


def test_the_page_in_a_browser(runs, tmp_path):
    """On a narrow screen, by keyboard."""
    folder = write_checkpoint(tmp_path / "tiny", BYTES)
    with Server(folder, BYTES, token="sesame", runs=runs) as server, \
            browser_page(f"http://127.0.0.1:{server.port}/") as page:
        # the token
        page.fill("#token", "wrong")
        page.press("#token", "Enter")
        page.wait_for_selector("#error:has-text('wrong or missing token')")
        page.fill("#token", "sesame")
        page.press("#token", "Enter")
        page.wait_for_selector("#model:has-text('tiny')")

        # the playground: the same tokens as by the API, their runners-up, another way to go on
        page.fill("#prompt", "ab")
        page.fill("#seed", "1")
        page.fill("#max_tokens", "13")
        page.press("#prompt", "Control+Enter")
        page.wait_for_selector("#generate:enabled")
        page.wait_for_selector("#status:has-text('tokens')")
        text = server.complete("ab", temperature=0.8).choices[0].text
        assert page.text_content("#text") == "ab" + text
        page.focus("#text")
        page.keyboard.press("Home")
        page.keyboard.press("ArrowRight")
        assert page.text_content("#runners-title").startswith("Token 2 had a probability of")
        assert page.locator("#runners button").count() >= 8
        page.click(".token >> nth=0")
        page.hover(".token >> nth=2")
        assert page.text_content("#runners-title").startswith("Token 1 had")

        # the runs
        page.focus("#tab-play")
        page.keyboard.press("ArrowRight")
        page.wait_for_selector("#chart path")
        assert page.locator("#chart path").count() == 3
        page.focus("#chart")
        page.keyboard.press("End")
        assert "3.0000" in page.text_content("#values")
        page.uncheck("input[data-run='zwei é']")
        page.wait_for_selector("#settings:has-text('learning_rate')")
        with open(runs / "one" / "metrics.jsonl", "a") as file:
            file.write('\n{"iter": 11, "tokens": 84, "loss": 2.125, "ms": 60000}\n')
        page.wait_for_selector("#values:has-text('2.1250')")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.errors == []


def test_the_page_forgets_the_oldest_turns(chat_server):
    with browser_page(f"http://127.0.0.1:{chat_server.port}/") as page:
        page.wait_for_selector("#mode:visible")
        page.select_option("#mode", "chat")
        page.fill("#max_tokens", "5")
        page.fill("#seed", "1")
        # Each question and its answer take over 40 of the context's 101 tokens.
        for forgotten in ("", "", "1 oldest", "2 oldest"):
            page.fill("#prompt", "a" * 38)
            page.press("#prompt", "Control+Enter")
            page.wait_for_selector("#generate:enabled")
            page.wait_for_selector(f"#status:has-text('{forgotten}')")
            assert page.text_content("#error") == ""
        # One that is too long alone is refused.
        page.fill("#prompt", "a" * 101)
        page.press("#prompt", "Control+Enter")
        page.wait_for_selector("#error:has-text('shorten it')")
        assert page.errors == []
