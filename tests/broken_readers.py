"""Processes that a fuzzer of files has to notice; apart from it, so that they start at once."""

import os
import time


def dies(pipe, folder):
    pipe.send(["config"])
    pipe.recv()
    os.abort()


def hangs(pipe, folder):
    pipe.send(["config"])
    time.sleep(600)
