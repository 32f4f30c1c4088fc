"""The word-level tokenizer of the caption grammar and a tiny UMT5 text encoder."""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from .captions import vocabulary

SPECIAL = ("<pad>", "</s>", "<unk>")
#: Longest caption of the grammar is 20 tokens with its end; the rest is room for a user's own words.
MAX_LENGTH = 32


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A lower-casing word tokenizer with an explicit vocabulary: training one would give other ids on every build."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    vocab = {word: i for i, word in enumerate((*SPECIAL, *vocabulary()))}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", vocab["</s>"])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="right",
        model_max_length=MAX_LENGTH,
    )


def build_text_encoder(
    tokenizer: PreTrainedTokenizerFast, dim: int = 96, layers: int = 2, heads: int = 4
) -> UMT5EncoderModel:
    """A tiny UMT5 encoder, output (B, L, dim)."""
    config = UMT5Config(
        vocab_size=len(tokenizer),
        d_model=dim,
        d_kv=dim // heads,
        d_ff=2 * dim,
        num_layers=layers,
        num_decoder_layers=layers,
        num_heads=heads,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    return UMT5EncoderModel(config)
