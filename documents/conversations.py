"""Conversations in files: rows of .json (a list), .jsonl and .parquet, also as .gz or .zst.

`read_conversation` knows a row's shape by its keys; `read_pair` reads rows of preferences.
"""

import json
from typing import NamedTuple

from configurator import UserError
from documents.readers import JSON_KINDS, DocumentReader, parse_json, unpacked_name

SUFFIXES = ".json .jsonl .parquet"
SHAPES = ("messages (a list of role and content); conversations (a list of from and value); "
          "instruction, input and output; prompt and response (or completion)")
# The roles by the names that they have in files, and which role may follow which.
ROLES = {"system": "system", "developer": "system", "user": "user", "human": "user",
         "assistant": "assistant", "gpt": "assistant", "function_call": "assistant",
         "tool": "result", "function": "result", "observation": "result"}
MAY_FOLLOW = {"": ("system", "user"), "system": ("user",), "user": ("assistant",),
              "assistant": ("user", "result"), "result": ("result", "assistant")}


class Message(NamedTuple):
    role: str  # system, user, assistant, or result: what a tool returned
    content: str
    tool_calls: tuple = ()  # the assistant's, each a text, after the content


# ---------------------------------------------------------------------- rows of files


def read_rows(paths, bad_text):
    """Yield (where, row) for each row of some files: its place for messages, and a dict. Raises
    UserError for what is not rows. bad_text: as of DocumentReader."""
    reader = DocumentReader("", bad_text, ())
    for path in paths:
        with open(path, "rb") as file:
            # The rows, by the kind of the file.
            name = unpacked_name(path)
            if name.endswith(".json"):
                rows = parse_json(path, "".join(reader.decoded_chunks(path, file)))
                if not isinstance(rows, list):
                    raise UserError(f"{path}: {kind_of(rows)}, not a list of rows; if each of its "
                                    "lines is a row, name it .jsonl")
            elif name.endswith(".jsonl"):
                rows = jsonl_rows(reader, path, file)
            elif name.endswith(".parquet"):
                rows = parquet_rows(path, file)
            else:
                raise UserError(f"{path}: conversations are read from {SUFFIXES}; convert it")

            # Each with its place.
            for number, row in enumerate(rows, 1):
                where = f"{path}, row {number:,}"
                if not isinstance(row, dict):
                    raise UserError(f"{where}: {kind_of(row)}, not an object; the shapes that are "
                                    f"known: {SHAPES}")
                yield where, row


def jsonl_rows(reader, path, file):
    for number, line in reader.decoded_lines(path, file):
        if line.strip():
            yield parse_json(f"{path}, line {number:,}", line)


def parquet_rows(path, file):
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        for batch in ParquetFile(file).iter_batches(batch_size=1024):
            yield from batch.to_pylist()
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as parquet ({error})") from error


def kind_of(value):
    """Return what messages call a value of JSON."""
    return JSON_KINDS.get(type(value), "text" if isinstance(value, str) else "nothing")


# ---------------------------------------------------------------------- conversations of rows


def read_conversation(row, where):
    """Return the Messages of a row. Raises UserError for an unknown shape, for roles that do not
    take turns, and where the assistant says nothing."""
    messages = read_prompt(row, where)
    # A list of messages has the answers in it; in other shapes the answer has a key of its own.
    if not isinstance(row.get("messages", row.get("conversations")), list):
        answers = [row[key] for key in ("output", "response", "completion") if key in row]
        if not (messages and answers):
            raise unknown_shape(row, where, SHAPES)
        messages += read_answer(answers[0], where)
    return check_turns(messages, where)


def read_pair(row, where):
    """Return (the Messages with the chosen answer, those with the rejected one, the number of
    Messages before the answers) of a row of preferences."""
    if not {"chosen", "rejected"} <= row.keys():
        raise unknown_shape(row, where, "chosen, rejected, and the prompt: prompt; or instruction "
                            "and input; or messages; or conversations")

    # Some rows repeat the whole conversation with each answer.
    prompt, pair = read_prompt(row, where), []
    for key in ("chosen", "rejected"):
        messages = read_answer(row[key], f"{where}, {key}")
        if messages[:1] and messages[0].role == "assistant":
            messages = prompt + messages
        pair.append(check_turns(messages, f"{where}, {key}"))

    # The answers are what follows the messages that both have.
    chosen, rejected = pair
    shared = min(len(chosen), len(rejected)) - 1
    while chosen[:shared] != rejected[:shared]:
        shared -= 1
    if {chosen[shared].role, rejected[shared].role} != {"assistant"}:
        raise UserError(f"{where}: chosen and rejected do not answer the same prompt")
    return chosen, rejected, shared


def read_prompt(row, where):
    """Return the Messages of a row without its answer; [] where no key is known."""
    keys = ("messages", "conversations", "prompt", "instruction")
    found = [row[key] for key in keys if row.get(key) is not None]
    if not found:
        return []

    # A list of messages, or what the user says.
    if isinstance(found[0], list):
        messages = read_messages(found[0], where)
    else:
        text = check_text(found[0], where)
        if row.get("input"):
            text += "\n\n" + check_text(row["input"], where)
        messages = [Message("user", text)]

    # The tools that a row describes belong to what the system says.
    system = []
    if row.get("system"):
        system.append(check_text(row["system"], where))
    if messages and messages[0].role == "system":
        system.append(messages.pop(0).content)
    tools = row.get("tools") or "[]"
    if not isinstance(tools, str):
        tools = json.dumps(tools, ensure_ascii=False)
    if tools != "[]":
        system.append(check_text(tools, where))
    if system:
        messages.insert(0, Message("system", "\n\n".join(system)))
    return messages


def read_answer(answer, where):
    """Return the Messages of an answer: a text, a message, or a list of messages."""
    if isinstance(answer, dict):
        answer = [answer]
    if isinstance(answer, list):
        return read_messages(answer, where)
    return [Message("assistant", check_text(answer, where))]


def read_messages(raw_messages, where):
    messages = []
    for number, raw in enumerate(raw_messages, 1):
        place = f"{where}, message {number}"
        if not isinstance(raw, dict):
            raise UserError(f"{place}: {kind_of(raw)}, not an object with role and content")
        name = raw.get("role", raw.get("from"))
        if name not in list(ROLES):
            raise UserError(f"{place}: unknown role {name!r:.60}; the roles that are known: "
                            f"{', '.join(ROLES)}")

        # The text, and the calls of tools, which may be a message of their own.
        text, calls = read_content(raw.get("content", raw.get("value")), place)
        if name == "function_call":
            text, calls = "", [text]
        more_calls = raw.get("tool_calls") or []
        if not isinstance(more_calls, list) or not all(isinstance(c, dict) for c in more_calls):
            raise UserError(f"{place}: tool_calls is not a list of objects")
        for call in more_calls:
            calls.append(json.dumps(call.get("function", call), ensure_ascii=False))
        messages.append(Message(ROLES[name], text, tuple(calls)))
    return messages


def read_content(content, where):
    """Return (text, list of calls) of a message's content: a text, or a list of typed parts, whose
    texts are joined by blank lines."""
    if content is None:
        return "", []
    if not isinstance(content, list):
        return check_text(content, where), []

    texts, calls = [], []
    for part in content:
        if not isinstance(part, dict):
            raise UserError(f"{where}: a part that is {kind_of(part)}, not an object")
        kind = part.get("type")
        text = part.get("text", part.get("value"))
        if kind == "tool_call":
            calls.append(check_text(text, where))
        elif kind in ("text", "reasoning"):
            texts.append(check_text(text, where))
        else:
            raise UserError(f"{where}: a part of type {kind!r}; only text, reasoning and tool_call "
                            "can be read")
    return "\n\n".join(texts), calls


def check_text(text, where):
    """Return a text. Raises UserError for anything else. Lone surrogates, which JSON can hold and
    UTF-8 cannot, become question marks."""
    if not isinstance(text, str):
        raise UserError(f"{where}: {kind_of(text)} where a text should be")
    return text.encode("utf-8", "replace").decode()


def check_turns(messages, where):
    """Return the messages. Raises UserError where their roles do not take turns, or where none is
    the assistant's."""
    before = ""
    for number, message in enumerate(messages, 1):
        if message.role not in MAY_FOLLOW[before]:
            raise UserError(f"{where}: message {number} is the {message.role}'s, where one of the "
                            f"{' or the '.join(MAY_FOLLOW[before])} should be; correct the row, or "
                            "leave it out")
        before = message.role
    if "assistant" not in [message.role for message in messages]:
        raise UserError(f"{where}: the assistant says nothing; leave the row out")
    return messages


def unknown_shape(row, where, shapes):
    return UserError(f"{where}: unknown keys ({', '.join(row) or 'none'}); the shapes that are "
                     f"known: {shapes}")
