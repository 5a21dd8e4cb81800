"""Spiking networks (Neftci, Mostafa and Zenke 2019): leaky integrate-and-fire neurons, trained through a surrogate gradient."""
