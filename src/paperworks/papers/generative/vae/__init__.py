"""VAE (Kingma and Welling 2014): a latent-variable model and its inference network, learnt by one bound."""
