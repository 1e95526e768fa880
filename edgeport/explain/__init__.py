"""Why the numbers are what they are: where the bytes went, where the error grows, which inputs flipped, what decides.

Everything here reads the shipped file, the evidence and the original; nothing judges. `edgeport.explaining` puts the
parts together, `document.py` is what comes out.
"""
