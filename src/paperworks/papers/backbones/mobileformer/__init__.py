"""Mobile-Former (Chen et al. 2022): a MobileNet and a Transformer of six tokens side by side, with a bridge both ways."""
