"""all-MiniLM-L6-v2 by transformers: minilm_peer.py DIR TEXTS (a JSON list) prints unit vectors."""

import json
import sys

import torch
from transformers import AutoTokenizer, BertModel

place, texts = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(place)
model = BertModel.from_pretrained(place, attn_implementation="eager").eval()
found = []
for text in json.loads(texts):
    inputs = tokenizer(text, truncation=True, max_length=256, padding=False, return_tensors="pt")
    with torch.no_grad():
        states = model(**inputs).last_hidden_state[0]
    found.append(torch.nn.functional.normalize(states.mean(0), dim=0).tolist())
print(json.dumps({"embeddings": found}))
