"""An OpenAI-compatible HTTP server in front of the engine.

`bodies` reads a request, `desk` lets it in or turns it away and hands its tokens over, `worker` is the one thread that
calls the engine, `text` and `answer` make OpenAI's objects of tokens, `app` speaks HTTP, `server` starts and drains.
"""
