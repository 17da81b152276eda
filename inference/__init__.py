"""Segment 13 organs on abdominal CT: NIfTI in, label map out, one ONNX network between. See pipeline.py first."""
