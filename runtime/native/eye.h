// The target's image encoder with its projector: a picture's pixels become rows of a prompt.
#pragma once

#include <memory>
#include <vector>

#include "backend.h"
#include "model.h"

namespace edgespec {

class Eye {
  public:
    Eye(const VisionEntry& entry, Backend& backend);

    // Features [rows, hidden] of pixels [3, size, size], appended to `features`, and a draft's to `drafts`; what the call took.
    CallRecord look(const std::vector<float>& pixels, std::vector<float>& features, std::vector<float>& drafts);

    const VisionEntry& entry;

  private:
    std::unique_ptr<Graph> graph_;
    std::vector<float> pixels_, features_, drafts_;
    std::unique_ptr<Call> call_;  // last: it is bound to the buffers
};

}  // namespace edgespec
