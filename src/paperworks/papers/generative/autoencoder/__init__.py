"""Deep autoencoder (Hinton and Salakhutdinov 2006): pre-trained layer by layer, then fine-tuned."""
