"""SGLang on an ordinary CPU: its launcher, and the attention, prefill and sampling that are faster there."""
