"""What the server does to vLLM so that no request can hurt it or another one.

Each module begins with the symptom, its cause, what is changed, and when it may be removed.
"""
