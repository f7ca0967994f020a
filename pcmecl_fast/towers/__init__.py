"""CLIP's frozen towers, run exactly as open_clip runs them and faster: `text.py`, and the layers in `frozen.py`."""
