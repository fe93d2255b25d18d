"""The one picture of the run that each reader is answered from, and the stream that pages follow."""
