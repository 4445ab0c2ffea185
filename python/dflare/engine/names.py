"""What SGLang knows the algorithm and the attention backend by."""

ALGORITHM = "DFLARE"
ATTENTION_BACKEND = "dflare"
