"""SGLang on an ordinary CPU: its launcher, and faster attention, prefill and sampling."""
