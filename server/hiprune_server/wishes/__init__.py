"""What a request wishes for its pictures, and where on each route a wish may stand.

Pure: neither vLLM nor a web framework is imported here.
"""
