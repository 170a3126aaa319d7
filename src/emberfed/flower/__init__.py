"""All that knows Flower, whose transport carries our questions and replies: only it and engines import flwr."""
