#!/bin/sh
# Asks a demo server for an answer with a budget, and fails where it was not kept to.
#   .github/ask.sh http://127.0.0.1:8000 [KEY]
set -eu
url=$1 key=${2:-none}
picture=$(base64 -w0 server/hiprune_server/demo/samples/shapes-1.jpg)
answer=$(
    curl --silent --show-error --fail-with-body --max-time 120 "$url/v1/chat/completions" \
        --header 'Content-Type: application/json' --header "Authorization: Bearer $key" --data @- <<EOF
{"model": "hiprune-demo", "max_tokens": 8, "hiprune": {"tokens": 64}, "messages": [{"role": "user", "content": [
  {"type": "image_url", "image_url": {"url": "data:image/jpeg;base64,$picture"}},
  {"type": "text", "text": "What is in this picture?"}]}]}
EOF
)
echo "$answer"
echo "$answer" | grep -q '"tokens_full":576,"tokens_kept":64'
