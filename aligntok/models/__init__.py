"""What is trained: encoder, adapter, decoder, tokenizer, discriminator, LightningDiT."""
