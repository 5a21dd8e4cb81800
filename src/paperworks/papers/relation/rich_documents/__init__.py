"""Rich documents (Liu et al. 2019): a graph of all text segments of a page tells a BiLSTM-CRF where each one stands."""
