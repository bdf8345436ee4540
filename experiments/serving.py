"""What answering clients together is worth: N requests at once and one after the other, by turns.

    python serve.py --init_from=out/stdlib --slots=10 --port=8001 &
    python experiments/serving.py --url=http://127.0.0.1:8001 --clients=10 --tokens=200

Prints tokens per second of each turn, and the ratio of the medians; then the time to the first
token of one client alone, and of all at once.
"""

import argparse
import http.client
import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--prompt", default="def main(")
    args = parser.parse_args()

    # the first turn warms up, and is not counted
    speeds, firsts = {1: [], args.clients: []}, {1: [], args.clients: []}
    for turn in range(args.turns + 1):
        for at_once in (1, args.clients):
            started = time.perf_counter()
            with ThreadPoolExecutor(at_once) as pool:
                done = list(pool.map(lambda seed: ask(args, seed), range(args.clients)))
            seconds = time.perf_counter() - started
            speed = sum(tokens for tokens, _ in done) / seconds
            if turn:
                speeds[at_once].append(speed)
                firsts[at_once] += [first for _, first in done]
                print(f"turn {turn}, {at_once:2} at once: {speed:8.1f} tokens/s", flush=True)

    alone, together = statistics.median(speeds[1]), statistics.median(speeds[args.clients])
    print(f"median: one at a time {alone:.1f}, {args.clients} at once {together:.1f} tokens/s, "
          f"ratio {together / alone:.2f}")
    for at_once, seconds in firsts.items():
        print(f"time to the first token, {at_once:2} at once: median "
              f"{1000 * statistics.median(seconds):.0f} ms, longest {1000 * max(seconds):.0f} ms")


def ask(args, seed):
    """Return (tokens, seconds to the first one) of a streamed answer."""
    connection = http.client.HTTPConnection(urlsplit(args.url).netloc, timeout=600)
    body = {"prompt": args.prompt, "max_tokens": args.tokens, "seed": seed, "stream": True,
            "stream_options": {"include_usage": True}}
    started = time.perf_counter()
    connection.request("POST", "/v1/completions", json.dumps(body))
    response = connection.getresponse()
    assert response.status == 200, response.read()
    # read the events to the end; the last one but [DONE] has the number of tokens
    first, usage = None, None
    for line in response:
        if line.startswith(b"data: {"):
            first = first or time.perf_counter() - started
            usage = json.loads(line[6:]).get("usage") or usage
    connection.close()
    return usage["completion_tokens"], first


if __name__ == "__main__":
    main()
