"""A GPT of flatgpt for Hugging Face transformers; model.py beside this file computes it.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Sizes: B batch, T time, V vocabulary.
"""

from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .model import GPT, GPTConfig


class FlatGPTConfig(PreTrainedConfig):
    model_type = "flatgpt"

    def __init__(self, gpt=None, **settings):
        """gpt: the fields of model.py's GPTConfig."""
        self.gpt = gpt or {}
        super().__init__(**settings)


class FlatGPT(PreTrainedModel, GenerationMixin):
    config_class = FlatGPTConfig

    def __init__(self, config):
        super().__init__(config)
        self.gpt = GPT(GPTConfig(**config.gpt))
        self.post_init()

    def _init_weights(self, module):
        """All weights are in the file."""

    def get_input_embeddings(self):
        return self.gpt.transformer.wte

    def forward(self, input_ids, attention_mask=None, past_key_values=None, labels=None, **unused):
        """input_ids: (B, T). labels: (B, T), -100 where there is none; label t is the token t
        itself, which is predicted from those before it. Raises ValueError for rows that are padded
        on the left, and for more tokens than the model's block_size."""
        if attention_mask is not None and not attention_mask[:, 0].all():
            raise ValueError("a row is padded on the left, which this model cannot read; give rows "
                             "of equal length, one at a time, or padded on the right")

        # With a cache: make room for the new keys and values, where the model writes them.
        cache, start = None, 0
        if past_key_values is not None:
            start = past_key_values.get_seq_length()
            room = self.gpt.make_cache(len(input_ids), self.dtype, input_ids.shape[1])
            cache = [past_key_values.update(k, v, i) for i, (k, v) in enumerate(room)]

        logits = self.gpt.head(self.gpt.hidden(input_ids, cache, start))  # (B, T, V)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
