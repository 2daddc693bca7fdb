// What edgespec-runtime says of itself, and of the lines that it understands.
#include "protocol.h"

namespace edgespec {

const char* const HELP = R"(edgespec-runtime --bundle DIR [--threads N] [--table FILE] [--no-prepack] [--qnn DIR --htp-arch N --soc-model N [--compiled SOC]]

Runs a bundle's graphs: speculative decoding over JSON lines, one request a line on standard input, events on
standard output. Tokens are ids of the bundle's tokenizer; texts are the driver's business.

  --threads N    threads of all graphs together (default: the machine's cores, at most 4)
  --table FILE   what calls cost, as `tune` measured it (default: a guess from the bundle)
  --no-prepack   ONNX Runtime's kernels over weights as the file has them, whose pages the system may drop: slower
  --qnn DIR      compile the graphs for Qualcomm's NPU and run them there; DIR holds libonnxruntime_providers_qnn.so and
                 libQnnHtp.so, --htp-arch and --soc-model are Qualcomm's numbers of the SoC (8 Elite: 79 and 69)
  --compiled SOC with --qnn: open the context binaries that the bundle holds for this SoC (8-elite) instead of compiling

The first line is {"event":"ready",...}. Every answer carries the request's id; a request that fails gets
{"id":..,"event":"error","error":..,"hint":..} and the sessions live on.

  {"op":"open","id":1,"session":"a","picture_bytes":N}
      a conversation; its caches are made here. Of a bundle that reads images, the rows of pictures are kept to be absorbed
      again where the conversation is cut back, the oldest no longer than N bytes hold them (default: 256 MiB)
  {"op":"generate","id":2,"session":"a","tokens":[..],"max_new_tokens":128,"temperature":0,"top_k":0,"top_p":1,
   "min_p":0,"repetition_penalty":1,"seed":0,"drafter":"auto|draft|ngram|both|none",
   "stop_rule":"cost|adaedl|confidence|fixed","draft_tokens":K,"threshold":0.5,"lambda":0.7,"acceptance":0.9,
   "stop_ids":[..],"trace":false}
      events: prompt, then a round for each verify call, then done with its reason (stop, length, cancelled,
      positions) and its figures; "max_new_tokens":0 only absorbs the tokens
  {"op":"look","id":12,"session":"a","pixels":".."}
      a bundle that reads images: a picture's pixels, float32 [3,size,size] in base64, for the next generate of the session,
      whose tokens hold the image's id once for each of its rows ("rows" in the answer)
  {"op":"cancel","id":3,"request":2}            between two rounds
  {"op":"truncate","id":4,"session":"a","tokens":n}
  {"op":"snapshot","id":5,"session":"a","path":"file"}
  {"op":"restore","id":6,"session":"b","path":"file"}
  {"op":"sessions","id":7}   {"op":"close","id":8,"session":"a"}
  {"op":"tune","id":9,"runs":20}                what a call costs at each width, in microseconds; a "run" event after each
  {"op":"check","id":10}                        do all widths give a row the same bits on this machine? "difference" is
                                                empty if so
  {"op":"quit","id":11}

Exit codes: 0 asked to quit, the input ended, or nobody reads the output; 2 the bundle or the machine; 101 a bug.
)";

}  // namespace edgespec
