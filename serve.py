"""Serve a model over HTTP: OpenAI's API, and a page to play with it and to watch runs.

    python serve.py --out_dir=out/stdlib       # then open http://127.0.0.1:8000
    curl http://127.0.0.1:8000/v1/completions -d '{"prompt": "def main(", "max_tokens": 50}'
    python serve.py --host=0.0.0.0 --token=SECRET     # for other machines too
"""

import socket
from contextlib import suppress
from pathlib import Path

from configurator import UserError, check_settings, run
from inference.generate import prepare_model
from runtime.cpu import tune_cpu
from runtime.processes import setup
from runtime.terminal import say
from sample import load_model_and_tokenizer, newest_run
from serving.api import Api
from serving.app import make_app
from serving.engine import Engine

LIMITS = {"port": ">= 0, <= 65535", "slots": ">= 1", "max_waiting": ">= 1",
          "max_new_tokens": ">= 1", "max_seconds": "> 0", "checkpoint": ("best", "latest")}
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def main(
    # the model
    init_from="resume",  # resume: the run in out_dir; or a checkpoint's folder, gpt2, gpt2-xl, ...
    out_dir="",  # the run's folder; '': the newest run in out/
    checkpoint="best",  # which of the run's checkpoints: best or latest
    # the server
    host="127.0.0.1",  # the address to listen at; 0.0.0.0: at all of this machine's
    port=8000,  # 0: any free one
    token="",  # what clients must send as their API key; '': nothing
    runs="out",  # the folder whose runs the page shows
    # limits
    slots=8,  # answers drawn together; each has a part of the memory for keys and values
    max_waiting=100,  # answers that may wait for a slot
    max_new_tokens=1000,  # most tokens of an answer
    max_seconds=300.0,  # a request takes no longer; an answer is then cut
    # the hardware
    device="auto",  # auto, cpu, mps, cuda or, of several GPUs, cuda:1
    dtype="auto",  # of matrix products: float32, bfloat16, float16; auto: bfloat16 where native
):
    check_settings(locals(), LIMITS)
    if host not in LOOPBACK and not token:
        raise UserError(f"host={host!r}: other machines could use this server; add --token=SECRET")

    # The port first: that it is in use should not be said after a minute.
    listener = listen(host, port)
    runtime = setup(device, dtype)
    tune_cpu(runtime.device)

    # The model.
    model, tokenizer = load_model_and_tokenizer(init_from, out_dir, checkpoint)
    prepare_model(model, runtime)
    name = model_name(init_from, out_dir)

    # Serve it.
    with Engine(model, runtime, slots, max_waiting) as engine:
        api = Api(name, tokenizer, engine, max_new_tokens, max_seconds)
        app = make_app(api, runs, allowed_hosts(host), token)
        say(f"{name} is at {url_of(listener)}; Ctrl-C ends the server")
        with suppress(KeyboardInterrupt):  # uvicorn repeats it when it has ended
            make_server(app).run([listener])


def model_name(init_from, out_dir):
    """Return what clients call the model: the name of its run, or gpt2."""
    path = Path(init_from)
    if init_from == "resume":
        path = Path(out_dir or newest_run(Path("out")))
    return path.resolve().name  # which . has not


def listen(host, port):
    """Return a socket that listens. Raises UserError where it cannot."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        raise UserError(f"host={host!r}, port={port}: cannot listen there ({error.strerror}); "
                        "choose another --port=, or 0 for any free one") from error
    return listener


def url_of(listener):
    host, port = listener.getsockname()[:2]
    if ":" in host:
        host = f"[{host}]"
    return f"http://{host}:{port}"


def allowed_hosts(host):
    """Return the names by which the server may be called. Other machines, which need the token, may
    call it by any."""
    if host in LOOPBACK:
        return ["127.0.0.1", "localhost", "[::1]"]
    return ["*"]


def make_server(app):
    """Return uvicorn's server of an application, which Ctrl-C and SIGTERM end, with all streams."""
    import uvicorn

    # Its log would repeat what is printed here, and say that it ends streams.
    return uvicorn.Server(uvicorn.Config(
        app, log_config=None, log_level="critical", access_log=False, server_header=False,
        ws="none", lifespan="off", timeout_graceful_shutdown=0, limit_concurrency=1000))


if __name__ == "__main__":
    run(main)
