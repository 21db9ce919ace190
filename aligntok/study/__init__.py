"""`aligntok study`: every tokenizer of the paper and its ablations at a laptop's size, one generator on each of them.

`rows` says what is compared, `run` trains it, `measure` measures it, `results` reads what has been measured, `findings`
compares that with what the paper says, and `report` writes tables, plots and pictures.
"""
