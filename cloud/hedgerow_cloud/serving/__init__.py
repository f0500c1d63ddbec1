"""Large models on Ray Serve, behind the Open Inference Protocol."""
