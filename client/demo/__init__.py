"""pushstep.client.demo: the whole service on real data, in about a minute.

A server and two worker processes learn which flights arrive late, the same training runs here with torch's own
optimizers, and the two are put side by side. `data` reads the flights, `model` is what learns, `training` is the
one loop both sides run, `scores` judges, `worker` is a worker process, `processes` owns what is started, `served`
follows a training under one policy, `result` is what came out, `run` tells the story.
"""
