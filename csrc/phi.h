// The functions whose means the adversarial losses are; see gan_loss.cpp.

#pragma once

namespace aligntok {

enum class Phi { kLinear, kHinge, kSoftplus };

}  // namespace aligntok
