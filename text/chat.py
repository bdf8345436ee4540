"""A conversation as tokens, and which of them the loss counts.

    <|endoftext|>
    <|user|>Is it raining?<|end|>
    <|assistant|><|tool|>{"name": "weather"}<|end|>
    <|result|>dry<|end|>
    <|assistant|>No.<|end|>

(without the line breaks). The loss counts what the assistant writes: all that follows
<|assistant|>, up to <|end|> and with it. Each text is encoded alone, and text that spells a special
token stays text. So the tokens of a conversation's beginning are the beginning of its tokens, and a
model that continues a conversation reads what it was trained on.
"""

from configurator import UserError
from documents.conversations import Message, read_messages

SPECIAL = ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>", "<|tool|>", "<|result|>"]

# The same in the language of Hugging Face's chat templates (Jinja), for the tokenizer of a model
# that is published there. Their role tool is our result.
TEMPLATE = (
    "{{ '<|endoftext|>' }}{% for message in messages %}"
    "{{ '<|' + ('result' if message.role == 'tool' else message.role) + '|>' }}"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}"
    "{% for call in message.tool_calls %}"
    "{{ '<|tool|>' + (call if call is string else call.function | tojson) }}{% endfor %}"
    "{{ '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ message.content + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")


def render(messages, tokenizer):
    """Return (ids, mask) of a list of Messages (documents/conversations.py), each a list; mask: 1
    where the loss counts that id as a target, else 0. The tokenizer has the tokens of SPECIAL."""
    ids, mask = [tokenizer.eot], [0]
    for message in messages:
        message_ids, message_mask = render_message(message, tokenizer)
        ids += message_ids
        mask += message_mask
    return ids, mask


def render_message(message, tokenizer):
    """Return (ids, mask) of one message, each a list."""
    special = tokenizer.special
    ids = [special[f"<|{message.role}|>"], *tokenizer.encode(message.content).tolist()]
    for call in message.tool_calls:
        ids += [special["<|tool|>"], *tokenizer.encode(call).tolist()]
    ids.append(special["<|end|>"])

    # That it is the assistant's turn is given, not learned.
    is_target = int(message.role == "assistant")
    return ids, [0] + [is_target] * (len(ids) - 1)


def render_turns(messages, tokenizer, length):
    """Return (ids, mask) of the longest beginning of a conversation that ends with an answer and
    has at most `length` tokens, and how many messages that is; 0 where not even one answer fits."""
    ids, mask, kept, end = [tokenizer.eot], [0], 0, 0
    for number, message in enumerate(messages, 1):
        message_ids, message_mask = render_message(message, tokenizer)
        ids += message_ids
        mask += message_mask
        if len(ids) > length:
            break
        if message.role == "assistant":
            kept, end = number, len(ids)
    return ids[:end], mask[:end], kept


def knows_conversations(tokenizer):
    """Return whether a model with this tokenizer was trained on conversations."""
    return {"<|user|>", "<|assistant|>", "<|end|>"} <= tokenizer.special.keys()


def encode_messages(tokenizer, raw_messages, where):
    """Return the ids of messages, a list of {"role": ..., "content": ...}, and of the token with
    which the assistant's answer begins. Raises UserError, naming `where`, for anything else, and
    where the model was not trained on conversations."""
    if not knows_conversations(tokenizer):
        raise UserError(f"{where}: this model was not trained on conversations (its tokenizer has "
                        "no <|assistant|>); give it a prompt")
    if not isinstance(raw_messages, list) or not raw_messages:
        raise UserError(f"{where}: must be a list of at least one object with role and content")
    ids, _ = render(read_messages(raw_messages, where), tokenizer)
    return [*ids, tokenizer.special["<|assistant|>"]]


def encode_question(tokenizer, text):
    """Return the ids of what the user says."""
    ids, _ = render_message(Message("user", text), tokenizer)
    return ids
