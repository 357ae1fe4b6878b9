"""The demo: the whole service on real data, in about a minute.

A server and two worker processes learn which flights arrive late. The same training runs here with torch's own
optimizers, and the demo compares the two. `data` reads the flights, `model` holds the network and its score,
`training` is the loop that both sides run, `worker` is a worker process, `service` is the server, `processes` owns
what is started, `served` follows a training under one policy, `result` is the outcome, `picture` draws the losses,
`display` shows the progress, and `run` calls them in order.
"""
