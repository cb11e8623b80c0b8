"""The page of `samlove web`: a video and sentences in, a video with masks out.

`job.py` segments one video within bounds, `plot.py` draws loudness and object scores, `files.py` deletes what users
uploaded, and `page.py` is the page itself, made with Gradio, and its server.
"""
