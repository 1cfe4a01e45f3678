#!/usr/bin/env bash
# Everything that docs/benchmarks.md says of GPUs, in stages: each takes some minutes and leaves its files in OUT.
#
#   benchmarks/gpu.sh OUT kernels|correctness|every-kernel|engines|http|quantised|pages|steps|prefix|constrained|agent|masks ...
#
# Needs MLX for the GPU and mlx-lm with what they need, and no network. Models are written to $MODELS with random
# weights. $TOKENIZER is a folder with a tokenizer of at most 49,152 tokens (http); $PROTOTYPE a script to compare with.
set -euo pipefail

out=$1; shift
here=$(cd "$(dirname "$0")" && pwd)
models=${MODELS:-/tmp/models}
export PYTHONPATH="$here/..${PYTHONPATH:+:$PYTHONPATH}"
mkdir -p "$out" "$models"

model() { # NAME ARGUMENTS...: write the model once
  local name=$1; shift
  [ -e "$models/$name/config.json" ] || python3 "$here/random_model.py" "$1" "$models/$name" "${@:2}"
}

kernels() {
  python3 "$here/attention_kernel.py" --output "$out/attention.json" | tee "$out/attention.txt"
}

correctness() { # without TF32, float32 products have all their bits
  MLX_ENABLE_TF32=0 python3 -m pytest -q -p no:cacheprovider "$here/../tests/runner" -m "not slow" \
    -k "${TESTS:-llama and not llama4 or gemma3_text or gpu_kernels or gpt_oss or qwen3_next or copies_no_pool}" | tee "$out/correctness.txt"
}

every_kernel() { # each variant is compiled anew, on one core: several processes, a part of the suite each
  local suite="$here/../tests/runner/test_gpu_kernels.py" part parts=()
  rm -rf "$out/every-kernel" && mkdir -p "$out/every-kernel"
  (cd "$here/.." && python3 -m pytest -q -p no:cacheprovider --collect-only "$suite" | grep :: >"$out/every-kernel/all")
  split -n "r/${PROCESSES:-12}" "$out/every-kernel/all" "$out/every-kernel/part."
  for part in "$out"/every-kernel/part.*; do
    (cd "$here/.." && xargs -d '\n' -a "$part" env MLX_ENABLE_TF32=0 python3 -m pytest -q -p no:cacheprovider >"$part.txt" 2>&1) &
    parts+=($!)
  done
  for part in "${parts[@]}"; do wait "$part" || echo "a part failed"; done
  tail -qn 1 "$out"/every-kernel/part.*.txt | tee "$out/every-kernel.txt"
}

constrained() { # rows held to a schema against free ones
  model llama-3.2-3b-49k llama-3.2-3b --vocab 49152 --tokenizer "${TOKENIZER:-demo}"
  python3 "$here/constrained.py" --model "$models/llama-3.2-3b-49k" --rows 64 --tokens 128 | tee "$out/constrained.txt"
}

engines() {
  model llama-3.2-3b llama-3.2-3b
  python3 "$here/compare_engines.py" "$models/llama-3.2-3b" ${PROTOTYPE:+--prototype "$PROTOTYPE"} \
    --output "$out/engines.json" | tee "$out/engines.txt"
}

http() {
  model llama-3.2-3b-49k llama-3.2-3b --vocab 49152 --tokenizer "${TOKENIZER:-demo}"
  load one --prompt-words 100 --max-tokens 128 --concurrency 1 --num-requests 8
  load many --prompt-words 100 --max-tokens 128 --concurrency 64 --num-requests 128
  load mixed --prompt-mix 2x12000,30x100 --max-tokens 128 --concurrency 32
  python3 "$here/compare_engines.py" "$models/llama-3.2-3b-49k" --engines ours --scenario 1x133 --scenario 64x133 \
    --max-tokens 128 --output "$out/http-engine.json" | tee "$out/http-engine.txt"
}

load() { # NAME FLAGS...: our server and mlx-lm's under one load
  python3 "$here/peers/run.py" --peers mlx-lm --python "$(command -v python3)" --rounds 1 --logs "$out/http-$1" \
    --model "$models/llama-3.2-3b-49k" --output "$out/http-$1.json" -- "${@:2}" --ignore-eos | tee "$out/http-$1.txt"
}

quantised() {
  python3 "$here/quantised_rows.py" | tee "$out/quantised-rows.txt"
  model qwen3-0.6b-8bit qwen3-0.6b --bits 8
  model llama-3.2-3b-4bit llama-3.2-3b --bits 4
  python3 "$here/compare_engines.py" "$models/qwen3-0.6b-8bit" --scenario 1x256 --output "$out/qwen3-8bit.json" \
    | tee "$out/qwen3-8bit.txt"
  local rows=(--scenario 1x256 --scenario 16x256 --scenario 64x256)
  python3 "$here/compare_engines.py" "$models/llama-3.2-3b-4bit" "${rows[@]}" --output "$out/llama-4bit.json" \
    -- --weights-dtype stored | tee "$out/llama-4bit.txt"
  python3 "$here/compare_engines.py" "$models/llama-3.2-3b-4bit" "${rows[@]}" --engines ours \
    --output "$out/llama-4bit-expanded.json" -- --weights-dtype bf16 | tee "$out/llama-4bit-expanded.txt"
}

pages() { # quantised keys and values: the kernels alone, then whole engines
  local bits dtype
  for bits in 8 4; do
    python3 "$here/attention_kernel.py" --kv-bits "$bits" --output "$out/attention-int$bits.json" \
      | tee "$out/attention-int$bits.txt"
  done
  model llama-3.2-3b llama-3.2-3b
  for dtype in auto int8 int4; do
    python3 "$here/compare_engines.py" "$models/llama-3.2-3b" --engines ours --scenario 16x2048 --scenario 64x2048 \
      --output "$out/pages-$dtype.json" -- --kv-cache-dtype "$dtype" | tee "$out/pages-$dtype.txt"
  done
}

prefix() { # many requests with one long prefix
  model llama-3.2-3b llama-3.2-3b
  python3 "$here/shared_prefix.py" "$models/llama-3.2-3b" --output "$out/prefix.json" | tee "$out/prefix.txt"
}

masks() { # what planning attention costs chunks of prompts
  python3 "$here/prompt_attention.py" --output "$out/masks.json" | tee "$out/masks.txt"
}

agent() { # a long first prompt and the turns after it, beside mlx-lm's server
  model llama-3.2-3b-49k llama-3.2-3b --vocab 49152 --tokenizer "${TOKENIZER:-demo}"
  python3 "$here/agent_turns.py" --model "$models/llama-3.2-3b-49k" --python "$(command -v python3)" --rounds 1 \
    --output "$out/agent.json" | tee "$out/agent.txt"
}

steps() {
  model llama-3.2-3b llama-3.2-3b
  python3 "$here/plot_steps.py" --collect "$models/llama-3.2-3b" --rows 1,4,16,64 --contexts 256,2048,8192 \
    --output "$out/steps.json"
}

for stage in "$@"; do
  case $stage in
    kernels | correctness | every-kernel | engines | http | quantised | pages | steps | prefix | constrained | agent | masks)
      echo "== $stage"
      "${stage//-/_}"
      ;;
    *) echo "no stage $stage" >&2; exit 2 ;;
  esac
done
