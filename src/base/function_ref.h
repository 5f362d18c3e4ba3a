// A reference to something callable, for parameters: unlike std::function it never allocates, and it must not
// outlive what it refers to.
#pragma once

#include <memory>
#include <type_traits>
#include <utility>

namespace refrag {

template <typename Signature>
class FunctionRef;

template <typename Result, typename... Args>
class FunctionRef<Result(Args...)> {
  public:
    // Implicit, so that a lambda is passed as it stands.
    // NOLINTBEGIN(google-explicit-constructor, bugprone-forwarding-reference-overload): copies are excluded
    template <typename Callable>
    requires(!std::is_same_v<std::remove_cvref_t<Callable>, FunctionRef> &&
             std::is_invocable_r_v<Result, Callable&, Args...>) FunctionRef(Callable&& callable)
        : object_(const_cast<void*>(static_cast<const void*>(std::addressof(callable)))),
          call_([](void* object, Args... args) -> Result {
              return (*static_cast<std::remove_reference_t<Callable>*>(object))(std::forward<Args>(args)...);
          }) {}
    // NOLINTEND(google-explicit-constructor, bugprone-forwarding-reference-overload)

    Result operator()(Args... args) const { return call_(object_, std::forward<Args>(args)...); }

  private:
    void* object_;
    Result (*call_)(void*, Args...);
};

}  // namespace refrag
